//! Connections, from the socket to whoever is behind them: how many there may be, and for how long. Knows nothing of the
//! state: whose certificate is accepted is asked through [`tls::Accepts`].

pub mod admission;
pub mod connection;
pub mod principal;
pub mod throttle;
pub mod tls;
pub mod unix;
