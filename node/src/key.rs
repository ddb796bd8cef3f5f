//! The node's WireGuard private key: it cannot be printed by accident and leaves no copy in memory behind.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use policy::PublicKey;
use thiserror::Error;
use x25519_dalek::StaticSecret;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// Bytes of an X25519 key.
pub const KEY_LENGTH: usize = 32;

/// An X25519 private key. It has no `Display`, its `Debug` is redacted, and its memory is wiped when it is dropped.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct PrivateKey([u8; KEY_LENGTH]);

/// Why bytes or text are no private key. The text never contains the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum KeyError {
    #[error("a private key has {KEY_LENGTH} bytes, this one has {0}; make one with `wg genkey`")]
    Length(usize),
    #[error("a private key of zeros protects nothing; make one with `wg genkey`")]
    Zero,
    #[error("a private key is 44 characters of base64, this is not base64; make one with `wg genkey`")]
    Base64,
    #[error("the system gives no randomness")]
    Random,
}

impl PrivateKey {
    /// Makes a key of the system's randomness.
    pub fn generate() -> Result<Self, KeyError> {
        let mut bytes = Zeroizing::new([0; KEY_LENGTH]);
        getrandom::fill(bytes.as_mut()).map_err(|_| KeyError::Random)?;
        Self::from_bytes(bytes.as_ref())
    }

    /// Takes 32 bytes, clamped as RFC 7748 wants them.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, KeyError> {
        let mut key = Self(bytes.try_into().map_err(|_| KeyError::Length(bytes.len()))?);
        if key.0 == [0; KEY_LENGTH] {
            return Err(KeyError::Zero);
        }
        key.0[0] &= 0b1111_1000;
        key.0[31] &= 0b0111_1111;
        key.0[31] |= 0b0100_0000;
        Ok(key)
    }

    /// Reads the base64 of `wg genkey`; white space around it is allowed.
    pub fn from_base64(text: &str) -> Result<Self, KeyError> {
        let bytes = Zeroizing::new(STANDARD.decode(text.trim()).map_err(|_| KeyError::Base64)?);
        Self::from_bytes(&bytes)
    }

    /// The public half, by which peers know this node.
    pub fn public(&self) -> PublicKey {
        let public = x25519_dalek::PublicKey::from(&self.to_secret());
        PublicKey::try_from(public.as_bytes().as_slice()).expect("a clamped key times the base point is never zero")
    }

    /// For the key's file and for nothing else.
    pub fn to_base64(&self) -> Zeroizing<String> {
        Zeroizing::new(STANDARD.encode(self.0))
    }

    /// The bytes, for handing the key to what carries the packets.
    pub fn as_bytes(&self) -> &[u8; KEY_LENGTH] {
        &self.0
    }

    /// The key as `x25519-dalek` and gotatun take it.
    pub(crate) fn to_secret(&self) -> StaticSecret {
        StaticSecret::from(self.0)
    }
}

impl PartialEq for PrivateKey {
    /// By the public halves: nothing of the comparison's time depends on the private ones.
    fn eq(&self, other: &Self) -> bool {
        self.public() == other.public()
    }
}

impl Eq for PrivateKey {}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(redacted)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn public_key_is_the_one_that_wg_pubkey_prints() {
        let key = PrivateKey::from_base64("SGb+ojrRNDuMePufwtIYhXzA//k6wF3R21tEBgKlzlM=\n").unwrap();
        assert_eq!(key.public().to_string(), "DD5yKRfzExcV5+kDnTroDgCU15latdMjiQ59j1hEuk8=");
    }

    #[test]
    fn text_and_bytes_read_back() {
        let key = PrivateKey::generate().unwrap();
        assert_eq!(*PrivateKey::from_base64(&key.to_base64()).unwrap().as_bytes(), *key.as_bytes());
        assert_eq!(*PrivateKey::from_bytes(key.as_bytes()).unwrap().as_bytes(), *key.as_bytes());
        assert_ne!(key, PrivateKey::generate().unwrap());
    }

    #[test]
    fn what_is_no_key_is_refused_with_the_reason() {
        fn check(text: &str, expected: KeyError) {
            assert_eq!(PrivateKey::from_base64(text).unwrap_err(), expected, "`{text}`");
        }
        check("", KeyError::Length(0));
        check("AAAA", KeyError::Length(3));
        check("AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", KeyError::Zero);
        check("not base64!", KeyError::Base64);
        assert_eq!(PrivateKey::from_bytes(&[7; 33]).unwrap_err(), KeyError::Length(33));
    }

    #[test]
    fn debug_says_nothing_of_the_key() {
        assert_eq!(format!("{:?}", PrivateKey::generate().unwrap()), "PrivateKey(redacted)");
    }
}
