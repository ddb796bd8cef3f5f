//! The table `[guard]`.

use std::str::FromStr;

use controller_api::defaults;
use serde::Deserialize;

use super::{Field, INTERFACE_MAX, ValueError};
use crate::kernel::guard::{Interfaces, Limit, Limits, Mode};

section! {
    /// The table `[guard]`. Every field may be left out.
    GuardFile, GUARD_FIELDS;

    /// Whether packets to the WireGuard port are looked at where they arrive, so that forged ones do not keep the node busy.
    enabled "enabled": bool = "true";
    /// Where they arrive: "auto" is where the default routes lead; or a list of interfaces, as ["eth0", "eth1"].
    interfaces "interfaces": Interfaces = "\"auto\"";
    /// "tc", or "xdp": in the driver where it can (some reset the link when it is asked for), else as "tc".
    mode "mode": Mode = "\"tc\"";
    /// Handshakes a second, of each of the two types, from one address (IPv4) or /64 (IPv6) that is no peer's endpoint, and
    /// five times as many at once.
    handshakes_per_source "handshakes-per-source": PerSecond = "20";
    /// Handshakes a second, of each type, from all such addresses, and as many at once.
    handshakes_in_all "handshakes-in-all": PerSecond = "1000";
    /// Handshakes a second, of each type, from the endpoint of one peer, and twice as many at once.
    handshakes_per_endpoint "handshakes-per-endpoint": PerSecond = "10";
    /// Handshakes of strangers, a second and CPU, of which it is computed whether the sender knows this node's public key.
    checks_per_cpu "checks-per-cpu": PerSecond = "100000";
}

/// The guard on the underlay, decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guard {
    pub interfaces: Interfaces,
    pub mode: Mode,
    pub limits: Limits,
}

/// A rate that the guard can keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PerSecond(pub u32);

/// The largest rate: above it nothing is limited.
const PER_SECOND_MAX: u32 = 10_000_000;

impl GuardFile {
    /// `None`: there is to be none.
    pub(super) fn resolve(self) -> Option<Guard> {
        /// A peer that gets no answer tries again after 5 s, and at a site with one address all of them may.
        const SOURCE_BURST: u32 = 5;
        /// A response may cross an initiation, and what was lost is repeated.
        const ENDPOINT_BURST: u32 = 2;
        /// The guard's clock ticks up to every 10 ms.
        const CHECKS_BURST: u32 = 20;
        let rate = |set: Option<PerSecond>, default| set.map_or(default, |rate| rate.0);
        let limit = |per_second: u32, burst: u32| Limit { per_second, burst: burst.max(1) };
        let source = rate(self.handshakes_per_source, defaults::HANDSHAKES_PER_SOURCE);
        let total = rate(self.handshakes_in_all, defaults::HANDSHAKES_IN_ALL);
        let endpoint = rate(self.handshakes_per_endpoint, defaults::HANDSHAKES_PER_ENDPOINT);
        let checks = rate(self.checks_per_cpu, defaults::CHECKS_PER_CPU);
        self.enabled.unwrap_or(true).then(|| Guard {
            interfaces: self.interfaces.unwrap_or_default(),
            mode: self.mode.unwrap_or_default(),
            limits: Limits {
                source: limit(source, source * SOURCE_BURST),
                total: limit(total, total),
                endpoint: limit(endpoint, endpoint * ENDPOINT_BURST),
                checks: limit(checks, checks / CHECKS_BURST),
            },
        })
    }
}

impl FromStr for Mode {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "tc" => Ok(Self::Tc),
            "xdp" => Ok(Self::Xdp),
            _ => Err(ValueError { value: text.to_owned(), reason: "is no hook of the guard's: it is `tc` or `xdp`" }),
        }
    }
}

impl<'de> Deserialize<'de> for Mode {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl<'de> Deserialize<'de> for Interfaces {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Given {
            Word(String),
            List(Vec<String>),
        }
        let fail = |value: &str, reason: &str| serde::de::Error::custom(format!("`{value}` {reason}"));
        match Given::deserialize(deserializer)? {
            Given::Word(word) if word == "auto" => Ok(Self::Auto),
            Given::Word(word) => Err(fail(&word, "is neither `auto` nor a list of interfaces, as [\"eth0\"]")),
            Given::List(list) if list.is_empty() => {
                Err(fail("[]", "names no interface: leave it out, or turn the guard off with `enabled = false`"))
            }
            Given::List(list) => match list
                .iter()
                .find(|name| name.is_empty() || name.len() > INTERFACE_MAX || name.contains(['/', ':']))
            {
                Some(name) => Err(fail(name, "is no interface name")),
                None => Ok(Self::These(list.into_iter().collect())),
            },
        }
    }
}

impl<'de> Deserialize<'de> for PerSecond {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let rate = i64::deserialize(deserializer)?;
        match u32::try_from(rate) {
            Ok(rate @ 1..=PER_SECOND_MAX) => Ok(Self(rate)),
            _ => Err(serde::de::Error::custom(format!("`{rate}` is no rate from 1 to {PER_SECOND_MAX} a second"))),
        }
    }
}
