//! Who may call what: the network's certificate authority, who a caller is, and the gate of each service.

pub mod authority;
pub mod caller;
pub mod gate;
