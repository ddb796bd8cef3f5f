//! The compression of BLAKE2s (RFC 7693), which WireGuard's first MAC is made of. Compiled for the kernel and for the host.
//!
//! The rounds are written out: the verifier sees straight code, and no word of the message is found by an index that it
//! would have to bound.

/// The eight words that a hash begins with.
const IV: [u32; 8] =
    [0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19];

macro_rules! mix {
    ($v:ident, $a:literal, $b:literal, $c:literal, $d:literal, $x:expr, $y:expr) => {
        $v[$a] = $v[$a].wrapping_add($v[$b]).wrapping_add($x);
        $v[$d] = ($v[$d] ^ $v[$a]).rotate_right(16);
        $v[$c] = $v[$c].wrapping_add($v[$d]);
        $v[$b] = ($v[$b] ^ $v[$c]).rotate_right(12);
        $v[$a] = $v[$a].wrapping_add($v[$b]).wrapping_add($y);
        $v[$d] = ($v[$d] ^ $v[$a]).rotate_right(8);
        $v[$c] = $v[$c].wrapping_add($v[$d]);
        $v[$b] = ($v[$b] ^ $v[$c]).rotate_right(7);
    };
}

macro_rules! round {
    ($v:ident, $m:ident: $($s:literal)*) => {
        round!(@ $v, $m, [$($s),*]);
    };
    (@ $v:ident, $m:ident, [$a:literal, $b:literal, $c:literal, $d:literal, $e:literal, $f:literal, $g:literal, $h:literal,
        $i:literal, $j:literal, $k:literal, $l:literal, $n:literal, $o:literal, $p:literal, $q:literal]) => {
        mix!($v, 0, 4, 8, 12, $m($a), $m($b));
        mix!($v, 1, 5, 9, 13, $m($c), $m($d));
        mix!($v, 2, 6, 10, 14, $m($e), $m($f));
        mix!($v, 3, 7, 11, 15, $m($g), $m($h));
        mix!($v, 0, 5, 10, 15, $m($i), $m($j));
        mix!($v, 1, 6, 11, 12, $m($k), $m($l));
        mix!($v, 2, 7, 8, 13, $m($n), $m($o));
        mix!($v, 3, 4, 9, 14, $m($p), $m($q));
    };
}

/// Takes one block in: `word` gives its 16 words in the byte order of this machine, each again whenever it is needed;
/// `count` bytes of the message are up to its end.
#[inline(always)]
pub fn compress(state: &mut [u32; 8], word: impl Fn(usize) -> u32, count: u32, last: bool) {
    let [a, b, c, d, e, f, g, h] = *state;
    let last = if last { u32::MAX } else { 0 };
    let mut v = [a, b, c, d, e, f, g, h, IV[0], IV[1], IV[2], IV[3], IV[4] ^ count, IV[5], IV[6] ^ last, IV[7]];
    round!(v, word: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
    round!(v, word: 14 10 4 8 9 15 13 6 1 12 0 2 11 7 5 3);
    round!(v, word: 11 8 12 0 5 2 15 13 10 14 3 6 7 1 9 4);
    round!(v, word: 7 9 3 1 13 12 11 14 2 6 5 10 4 0 15 8);
    round!(v, word: 9 0 5 7 2 4 10 15 14 1 11 12 6 8 3 13);
    round!(v, word: 2 12 6 10 0 11 8 3 4 13 7 5 15 14 1 9);
    round!(v, word: 12 5 1 15 14 13 4 10 0 7 6 3 9 2 8 11);
    round!(v, word: 13 11 7 14 12 1 3 9 5 0 15 4 8 6 2 10);
    round!(v, word: 6 15 14 9 11 3 0 8 12 2 13 7 1 4 10 5);
    round!(v, word: 10 2 8 4 7 6 1 5 15 11 9 14 3 12 13 0);
    let [h0, h1, h2, h3, h4, h5, h6, h7] = state;
    *h0 ^= v[0] ^ v[8];
    *h1 ^= v[1] ^ v[9];
    *h2 ^= v[2] ^ v[10];
    *h3 ^= v[3] ^ v[11];
    *h4 ^= v[4] ^ v[12];
    *h5 ^= v[5] ^ v[13];
    *h6 ^= v[6] ^ v[14];
    *h7 ^= v[7] ^ v[15];
}

/// A block of fewer bytes, filled up with zeros.
pub fn block(bytes: &[u8]) -> [u32; 16] {
    let mut whole = [0u8; 64];
    let length = bytes.len().min(whole.len());
    whole[..length].copy_from_slice(&bytes[..length]);
    core::array::from_fn(|i| u32::from_le_bytes([whole[4 * i], whole[4 * i + 1], whole[4 * i + 2], whole[4 * i + 3]]))
}

/// The state of a keyed hash with 16 bytes of output that has taken in its key.
pub fn keyed(key: &[u8; 32]) -> [u32; 8] {
    const OUTPUT: u32 = 16;
    let mut state = IV;
    state[0] ^= 0x0101_0000 | 32 << 8 | OUTPUT;
    let words = block(key);
    compress(&mut state, |at| words[at], 64, false);
    state
}

/// The hash of up to 64 bytes, without a key.
pub fn hash(bytes: &[u8]) -> [u8; 32] {
    const OUTPUT: u32 = 32;
    let mut state = IV;
    state[0] ^= 0x0101_0000 | OUTPUT;
    let words = block(bytes);
    compress(&mut state, |at| words[at], bytes.len() as u32, true);
    let mut output = [0; 32];
    for (bytes, word) in output.chunks_exact_mut(4).zip(state) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    output
}
