//! WireGuard's messages: what their type and length say, and their first MAC.

use super::reason;
use crate::blake2s;

/// A WireGuard message by its first word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    Initiation,
    Response,
    CookieReply,
    Data,
}

pub const INITIATION_LENGTH: u32 = 148;
pub const RESPONSE_LENGTH: u32 = 92;
pub const COOKIE_REPLY_LENGTH: u32 = 64;
/// Header and tag around nothing. Data is padded to multiples of 16, but not beyond the sender's MTU: with that of 1420 a
/// full packet is 1452 bytes.
pub const DATA_LENGTH_MIN: u32 = 32;
/// At the end of both handshake messages: `mac1` and `mac2`.
pub const MAC_LENGTH: u32 = 16;

impl Message {
    /// A type as 4 bytes: the number and three zeros.
    #[inline(always)]
    pub fn of(first: [u8; 4]) -> Option<Self> {
        match u32::from_le_bytes(first) {
            1 => Some(Self::Initiation),
            2 => Some(Self::Response),
            3 => Some(Self::CookieReply),
            4 => Some(Self::Data),
            _ => None,
        }
    }

    #[inline(always)]
    pub fn has_length(self, length: u32) -> bool {
        match self {
            Self::Initiation => length == INITIATION_LENGTH,
            Self::Response => length == RESPONSE_LENGTH,
            Self::CookieReply => length == COOKIE_REPLY_LENGTH,
            Self::Data => length >= DATA_LENGTH_MIN,
        }
    }

    /// Of a handshake: the index of its buckets. `None`: never limited.
    #[inline(always)]
    pub fn bucket(self) -> Option<u32> {
        match self {
            Self::Initiation => Some(0),
            Self::Response => Some(1),
            Self::CookieReply | Self::Data => None,
        }
    }

    /// Its reason when it passes.
    #[inline(always)]
    pub fn passed(self) -> u8 {
        match self {
            Self::Initiation => reason::INITIATION,
            Self::Response => reason::RESPONSE,
            Self::CookieReply => reason::COOKIE_REPLY,
            Self::Data => reason::DATA,
        }
    }
}

/// What kind of message begins with these bytes and has this length, or why it is dropped.
#[inline(always)]
pub fn classify(first: Option<[u8; 4]>, length: u32, fragment: bool) -> Result<Message, u8> {
    let Some(first) = first.filter(|_| length >= 4) else {
        return Err(if fragment { reason::FRAGMENTED } else { reason::WRONG_LENGTH });
    };
    let Some(message) = Message::of(first) else { return Err(reason::WRONG_TYPE) };
    if fragment {
        return if message == Message::Data { Ok(message) } else { Err(reason::FRAGMENTED) };
    }
    if message.has_length(length) { Ok(message) } else { Err(reason::WRONG_LENGTH) }
}

/// The state from which `mac1` of messages to the holder of a public key is computed.
pub fn mac1_state(public_key: &[u8; 32]) -> [u32; 8] {
    const LABEL: &[u8; 8] = b"mac1----";
    let mut bytes = [0; 40];
    bytes[..8].copy_from_slice(LABEL);
    bytes[8..].copy_from_slice(public_key);
    blake2s::keyed(&blake2s::hash(&bytes))
}

/// `mac1` over what a handshake message has ahead of it, for those that make such messages.
pub fn mac1(state: &[u32; 8], message: &[u8]) -> [u8; MAC_LENGTH as usize] {
    const KEY_BLOCK: u32 = 64;
    let mut state = *state;
    let blocks = message.chunks(64);
    let count = blocks.len();
    let mut taken = KEY_BLOCK;
    for (i, bytes) in blocks.enumerate() {
        taken += bytes.len() as u32;
        let words = blake2s::block(bytes);
        blake2s::compress(&mut state, |at| words[at], taken, i + 1 == count);
    }
    let mut mac = [0; MAC_LENGTH as usize];
    for (bytes, word) in mac.chunks_exact_mut(4).zip(state) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    mac
}
