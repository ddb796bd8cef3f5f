//! From what is asked to what is stored: the request, the draft of what would become of it, a trial that ends
//! there, and the one writer.

pub mod audit;
pub mod draft;
pub mod enrol;
pub mod request;
pub mod trial;
pub mod writer;

pub use request::Request;
