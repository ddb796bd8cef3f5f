//! Why a packet passed or did not. One number for each outcome: the index of its counter, and what `nodectl`, the
//! metrics and the events print.

macro_rules! reasons {
    ($($(#[$doc:meta])* $constant:ident = $number:literal, $name:literal, $verdict:ident;)*) => {
        $($(#[$doc])* pub const $constant: u8 = $number;)*

        /// Every reason with its printed name and whether the packet passes.
        pub const ALL: &[(u8, &str, bool)] = &[$(($number, $name, reasons!(@ $verdict)),)*];
    };
    (@ pass) => { true };
    (@ drop) => { false };
}

reasons! {
    /// Section 2: a rule decided to let the flow pass.
    RULE = 0, "rule", pass;
    /// Section 2: the lineage default.
    LINEAGE = 1, "lineage", pass;
    /// Section 3.7: the reverse of a recorded flow that is allowed.
    REPLY = 2, "reply", pass;
    /// Section 3.5: an error about a flow that is allowed.
    ICMP_ERROR = 3, "icmp-error", pass;
    /// Section 2: a rule denies.
    DENY_RULE = 4, "deny-rule", drop;
    /// Section 2: no rule matches, and the default lets nothing pass.
    NO_RULE = 5, "no-rule", drop;
    /// Section 2: the source lies in no cidr.
    UNKNOWN_SOURCE = 6, "unknown-source", drop;
    /// Section 2: the destination lies in no cidr.
    UNKNOWN_DESTINATION = 7, "unknown-destination", drop;
    /// Section 3.3: not an address that this node stands for.
    NOT_LOCAL = 8, "not-local", drop;
    /// Section 3.2: link-local, multicast, broadcast, loopback, unspecified; no event.
    SCOPE = 9, "scope", drop;
    /// Section 3.1: truncated, bad version or lengths.
    MALFORMED = 10, "malformed", drop;
    /// Section 3.1: IPv4 source route, or IPv6 routing header with segments left.
    SOURCE_ROUTE = 11, "source-route", drop;
    /// Section 3.4: a later fragment of a datagram whose first is not known to have passed, or an ICMP error in fragments.
    FRAGMENT = 12, "fragment", drop;
    /// Section 3.1: an IPv6 extension header out of place, or too many.
    EXTENSION_HEADER = 13, "extension-header", drop;
    /// Section 3.5: an error about no allowed flow.
    ICMP_ERROR_UNRELATED = 14, "icmp-error-unrelated", drop;
    /// The reverse of a flow that the policy has revoked.
    REVOKED = 15, "revoked", drop;
    /// No policy was loaded yet.
    NO_POLICY = 16, "no-policy", drop;
    /// The tables contradict themselves: a bug, closed.
    CORRUPT_TABLE = 17, "corrupt-table", drop;
    /// Section 3.4: a later fragment that overlaps the first.
    FRAGMENT_OVERLAP = 18, "fragment-overlap", drop;
}

/// Number of reasons.
pub const COUNT: u32 = ALL.len() as u32;

/// Whether a packet with this reason passes. The programs ask this: a number that is no reason drops.
#[inline(always)]
pub const fn passes(reason: u8) -> bool {
    matches!(reason, RULE | LINEAGE | REPLY | ICMP_ERROR)
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
