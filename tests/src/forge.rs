//! Forged WireGuard messages: random ones, as a flood sends them, and ones whose first MAC is right, as a sender who knows
//! the receiver's public key can make them.

use ebpf_common::underlay::{INITIATION_LENGTH, MAC_LENGTH, RESPONSE_LENGTH, mac1, mac1_state};

/// A message of a type and length with a pseudo-random body.
pub fn message(kind: u8, length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes: Vec<u8> = (0..length)
        .map(|_| {
            // xorshift64.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect();
    for (byte, value) in bytes.iter_mut().zip([kind, 0, 0, 0]) {
        *byte = value;
    }
    bytes
}

/// A handshake initiation without the MAC.
pub fn initiation(seed: u64) -> Vec<u8> {
    message(1, INITIATION_LENGTH as usize, seed)
}

/// A handshake response without the MAC.
pub fn response(seed: u64) -> Vec<u8> {
    message(2, RESPONSE_LENGTH as usize, seed)
}

/// A handshake message with the MAC that a receiver of this public key wants.
pub fn with_mac(mut message: Vec<u8>, public_key: &[u8; 32]) -> Vec<u8> {
    let at = message.len() - 2 * MAC_LENGTH as usize;
    let mac = mac1(&mac1_state(public_key), &message[..at]);
    message[at..at + mac.len()].copy_from_slice(&mac);
    message
}
