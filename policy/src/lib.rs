//! Rampart policy.
