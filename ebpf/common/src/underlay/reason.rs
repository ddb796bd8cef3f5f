//! What became of a datagram to the port.

macro_rules! reasons {
    ($($(#[$doc:meta])* $constant:ident = $number:literal, $name:literal, $passes:literal;)*) => {
        $($(#[$doc])* pub const $constant: u8 = $number;)*

        /// Every reason with its printed name and whether the datagram passes.
        pub const ALL: &[(u8, &str, bool)] = &[$(($number, $name, $passes),)*];
    };
}

reasons! {
    /// A handshake initiation that everything said yes to.
    INITIATION = 0, "initiation", true;
    /// A response, likewise.
    RESPONSE = 1, "response", true;
    COOKIE_REPLY = 2, "cookie-reply", true;
    DATA = 3, "data", true;
    /// No WireGuard message begins like this.
    WRONG_TYPE = 4, "wrong-type", false;
    /// No WireGuard message of this type has this length, or the UDP header's length is wrong.
    WRONG_LENGTH = 5, "wrong-length", false;
    /// A handshake in fragments, which no WireGuard sends, or a fragment too short to tell.
    FRAGMENTED = 6, "fragmented", false;
    /// A handshake whose sender does not know this node's public key.
    WRONG_MAC = 7, "wrong-mac", false;
    /// More handshakes than one prefix gets.
    LIMITED_SOURCE = 8, "limited-source", false;
    /// More handshakes than all strangers get together.
    LIMITED_TOTAL = 9, "limited-total", false;
    /// More handshakes than one known endpoint gets, and than there is time to check beyond that.
    LIMITED_ENDPOINT = 10, "limited-endpoint", false;
    /// More MACs to check than this CPU has time for.
    LIMITED_CHECKS = 11, "limited-checks", false;
    /// Several handshakes back to back from one socket, which the kernel had joined.
    JOINED = 12, "joined", false;
}

/// Number of reasons.
pub const COUNT: u32 = ALL.len() as u32;

/// Whether a datagram with this reason passes.
#[inline(always)]
pub const fn passes(reason: u8) -> bool {
    matches!(reason, INITIATION | RESPONSE | COOKIE_REPLY | DATA)
}

/// The printed name of a reason.
pub fn name(reason: u8) -> &'static str {
    ALL.get(usize::from(reason)).map_or("unknown", |(_, name, _)| name)
}

const _: () = {
    let mut i = 0;
    while i < ALL.len() {
        assert!(ALL[i].0 as usize == i);
        assert!(ALL[i].2 == passes(ALL[i].0));
        i += 1;
    }
};
