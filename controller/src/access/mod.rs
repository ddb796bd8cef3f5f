//! Who may call what, and how much: the network's certificate authority, who a caller is, the gate of each service, and the
//! bound of what one caller may ask.

pub mod authority;
pub mod bucket;
pub mod caller;
pub mod gate;
pub mod questions;
