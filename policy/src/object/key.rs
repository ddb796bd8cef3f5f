//! WireGuard public keys. Private keys never come near the policy.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use thiserror::Error;

/// A node's WireGuard public key. Never zero.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey([u8; Self::LEN]);

/// Bytes that are no public key.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum KeyError {
    #[error("a WireGuard public key has 32 bytes, not {0}; give the output of `wg pubkey`")]
    Length(usize),
    #[error("a WireGuard public key is not all zero; give the output of `wg pubkey`")]
    Zero,
    #[error("`{0}` is not base64; a WireGuard public key is the 44 characters that `wg pubkey` prints")]
    Text(String),
}

impl PublicKey {
    /// Bytes in a key.
    pub const LEN: usize = 32;

    pub fn as_bytes(&self) -> &[u8; Self::LEN] {
        &self.0
    }
}

impl TryFrom<&[u8]> for PublicKey {
    type Error = KeyError;

    fn try_from(bytes: &[u8]) -> Result<Self, KeyError> {
        let key: [u8; Self::LEN] = bytes.try_into().map_err(|_| KeyError::Length(bytes.len()))?;
        if key == [0; Self::LEN] {
            return Err(KeyError::Zero);
        }
        Ok(Self(key))
    }
}

impl TryFrom<[u8; PublicKey::LEN]> for PublicKey {
    type Error = KeyError;

    fn try_from(bytes: [u8; PublicKey::LEN]) -> Result<Self, KeyError> {
        Self::try_from(bytes.as_slice())
    }
}

impl FromStr for PublicKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        let bytes = STANDARD.decode(text).map_err(|_| KeyError::Text(text.to_owned()))?;
        Self::try_from(bytes.as_slice())
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_another_length_or_zero_are_refused() {
        assert_eq!(PublicKey::try_from([1; 31].as_slice()), Err(KeyError::Length(31)));
        assert_eq!(PublicKey::try_from([1; 33].as_slice()), Err(KeyError::Length(33)));
        assert_eq!(PublicKey::try_from([0; 32]), Err(KeyError::Zero));
        assert!(matches!("hello world".parse::<PublicKey>(), Err(KeyError::Text(_))));
        assert_eq!("AAAA".parse::<PublicKey>(), Err(KeyError::Length(3)));
    }

    #[test]
    fn a_key_prints_as_wireguard_prints_it() {
        let key = PublicKey::try_from([7; 32]).unwrap();
        assert_eq!(key.to_string(), "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=");
        assert_eq!(key.to_string().parse(), Ok(key));
    }
}
