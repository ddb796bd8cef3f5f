//! Every default that the daemons and their tools share. The constants and the rows of [`TABLE`] are written once, by
//! the macro below; the documentation's page is [`markdown`].

use std::path::PathBuf;
use std::time::Duration;

/// One row of the documentation's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Default {
    /// Kebab-case, as in the configuration files where it can be set there.
    pub name: &'static str,
    /// As printed, with its unit.
    pub value: &'static str,
    pub meaning: &'static str,
}

macro_rules! defaults {
    ($($name:literal $constant:ident = $value:tt $unit:ident, $meaning:literal;)*) => {
        $(
            #[doc = $meaning]
            pub const $constant: defaults!(@type $unit) = defaults!(@value $value $unit);
        )*

        /// Every default, in the order of the documentation.
        pub const TABLE: &[Default] = &[
            $(Default { name: $name, value: defaults!(@text $value $unit), meaning: $meaning },)*
        ];
    };

    (@type text) => { &'static str };
    (@type port) => { u16 };
    (@type count) => { usize };
    (@type bytes) => { usize };
    (@type mtu) => { u32 };
    (@type percent) => { u32 };
    (@type rate) => { u32 };
    (@type $duration:ident) => { Duration };

    (@value $value:tt seconds) => { Duration::from_secs($value) };
    (@value $value:tt hours) => { Duration::from_secs($value * 3_600) };
    (@value $value:tt days) => { Duration::from_secs($value * 86_400) };
    (@value $value:tt $plain:ident) => { $value };

    (@text $value:tt bytes) => { concat!($value, " bytes") };
    (@text $value:tt mtu) => { concat!($value, " bytes") };
    (@text $value:tt rate) => { concat!($value, " a second") };
    (@text $value:tt percent) => { concat!($value, " %") };
    (@text $value:tt seconds) => { concat!($value, " s") };
    (@text $value:tt hours) => { concat!($value, " h") };
    (@text $value:tt days) => { concat!($value, " d") };
    (@text $value:tt $plain:ident) => { concat!($value) };
}

defaults! {
    "interface" INTERFACE = "rampart0" text, "the WireGuard interface that a node creates";
    "listen-port" WIREGUARD_PORT = 51820 port, "the UDP port of a node's WireGuard";
    "mtu" MTU = 1420 mtu, "the MTU of the WireGuard interface";
    "persistent-keepalive" PERSISTENT_KEEPALIVE = 25 seconds, "how often a node keeps the way to a peer open through address translation";
    "listen" CONTROLLER_LISTEN = "[::]:7443" text, "where the controller serves nodes and admins (gRPC over TLS 1.3)";
    "controller-port" CONTROLLER_PORT = 7443 port, "the controller's TCP port where an endpoint names none";
    "controller-socket" CONTROLLER_SOCKET = "/run/rampart/controller.sock" text, "the Unix socket on which the controller serves root";
    "node-socket" NODE_SOCKET = "/run/rampart/<interface>.sock" text, "the Unix socket on which a node serves `nodectl`";
    "controller-state-dir" CONTROLLER_STATE_DIR = "/var/lib/rampart/controller" text, "the controller's database and its authority's key";
    "node-state-dir" NODE_STATE_DIR = "/var/lib/rampart/node" text, "a node's keys, certificate and last good state";
    "controller-config" CONTROLLER_CONFIG = "/etc/rampart/controller.toml" text, "the controller's configuration file";
    "node-config" NODE_CONFIG = "/etc/rampart/node.toml" text, "a node's configuration file";
    "admin-identity" ADMIN_IDENTITY = "~/.config/rampart" text, "a remote admin's key, certificate and endpoints";
    "controller-metrics" CONTROLLER_METRICS = "127.0.0.1:9587" text, "where the controller serves its metrics";
    "node-metrics" NODE_METRICS = "127.0.0.1:9586" text, "where a node serves its metrics";
    "invitation-lifetime" INVITATION_LIFETIME = 24 hours, "how long an invitation can be redeemed";
    "node-certificate-lifetime" NODE_CERTIFICATE_LIFETIME = 24 hours, "how long a node's certificate is good";
    "admin-certificate-lifetime" ADMIN_CERTIFICATE_LIFETIME = 30 days, "how long an admin's certificate is good";
    "controller-certificate-lifetime" CONTROLLER_CERTIFICATE_LIFETIME = 30 days, "how long the controller's own certificate is good";
    "authority-lifetime" AUTHORITY_LIFETIME = 3650 days, "how long the network's authority is good";
    "renew-after" RENEW_AFTER = 66 percent, "how much of its lifetime a certificate may use before it is renewed";
    "clock-tolerance" CLOCK_TOLERANCE = 300 seconds, "how far a certificate's beginning is set back, for clocks that differ";
    "connect-timeout" CONNECT_TIMEOUT = 5 seconds, "how long one endpoint may take to accept a connection, and again to agree on TLS";
    "request-timeout" REQUEST_TIMEOUT = 30 seconds, "how long a call may take (streams excepted)";
    "keepalive-interval" KEEPALIVE_INTERVAL = 30 seconds, "how often an idle connection between node and controller is probed";
    "keepalive-timeout" KEEPALIVE_TIMEOUT = 10 seconds, "how long such a probe may stay unanswered";
    "reconnect-min" RECONNECT_MIN = 1 seconds, "a node's first wait before it tries its controller again; doubled each time";
    "reconnect-max" RECONNECT_MAX = 10 seconds, "a node's longest wait before it tries its controller again";
    "reconcile-interval" RECONCILE_INTERVAL = 2 seconds, "how often a node compares the kernel with what it should be";
    "verify-interval" VERIFY_INTERVAL = 60 seconds, "how often a node reads its tables back from the kernel and holds them against the policy";
    "handshakes-per-source" HANDSHAKES_PER_SOURCE = 20 rate, "WireGuard handshakes that a node's guard lets through from one address (/32, /64) that is no peer's endpoint";
    "handshakes-in-all" HANDSHAKES_IN_ALL = 1000 rate, "likewise, from all such addresses: at about 0.1 ms each a tenth of a CPU";
    "handshakes-per-endpoint" HANDSHAKES_PER_ENDPOINT = 10 rate, "likewise, from the endpoint of one peer, which sends one in 5 s at most";
    "checks-per-cpu" CHECKS_PER_CPU = 100000 rate, "handshakes of strangers whose MAC the guard computes, on each CPU: at about 0.6 us each a sixteenth of it";
    "max-request" MAX_REQUEST = 4194304 bytes, "the largest request that the controller reads";
    "max-response" MAX_RESPONSE = 268435456 bytes, "the largest answer that a node or admin reads: a whole network or slice";
    "update-queue" UPDATE_QUEUE = 64 count, "updates that wait for one node; while it is slower than that, its changes become one update";
    "audit-limit" AUDIT_LIMIT = 100 count, "audit entries that are listed where no number is given";
    "history-limit" HISTORY_LIMIT = 100 count, "revisions that are listed where no number is given";
    "list-max" LIST_MAX = 10000 count, "audit entries, or revisions, that one answer lists at most";
    "history-revisions" HISTORY_REVISIONS = 16384 count, "how many of the newest revisions the controller keeps";
    "history-age" HISTORY_AGE = 90 days, "how old a revision may be that the controller keeps";
}

/// The Unix socket of the node that has this interface.
pub fn node_socket(interface: &str) -> PathBuf {
    PathBuf::from(NODE_SOCKET.replace("<interface>", interface))
}

/// How long after its beginning a certificate of this lifetime is renewed: two thirds of it, rounded down to percents.
pub fn renew_after(lifetime: Duration) -> Duration {
    lifetime * RENEW_AFTER / 100
}

/// The documentation's page.
pub fn markdown() -> String {
    let mut text = String::from(
        "# Defaults\n\nThis page is made from the code (`controller/api/src/defaults.rs`).\n\n\
         | default | value | meaning |\n| --- | --- | --- |\n",
    );
    for Default { name, value, meaning } in TABLE {
        text.push_str(&format!("| `{name}` | `{value}` | {meaning} |\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_unique_and_the_table_prints_them_all() {
        let names: BTreeSet<_> = TABLE.iter().map(|row| row.name).collect();
        assert_eq!(names.len(), TABLE.len());
        let text = markdown();
        assert!(names.iter().all(|name| text.contains(&format!("| `{name}` |"))));
        assert!(text.starts_with("# Defaults\n\n"));
        assert_eq!(text.lines().filter(|line| line.starts_with('|')).count(), TABLE.len() + 2);
    }

    #[test]
    fn text_and_constant_agree() {
        let value = |name: &str| TABLE.iter().find(|row| row.name == name).expect(name).value;
        assert_eq!(value("listen-port"), WIREGUARD_PORT.to_string());
        assert_eq!(value("node-certificate-lifetime"), "24 h");
        assert_eq!(NODE_CERTIFICATE_LIFETIME.as_secs(), 86_400);
        assert!(CONTROLLER_LISTEN.ends_with(&format!(":{CONTROLLER_PORT}")));
    }

    #[test]
    fn a_node_renews_well_before_its_certificate_ends() {
        let after = renew_after(NODE_CERTIFICATE_LIFETIME);
        assert!(after > NODE_CERTIFICATE_LIFETIME / 2 && after < NODE_CERTIFICATE_LIFETIME * 3 / 4);
    }

    #[test]
    fn a_socket_is_named_after_its_interface() {
        assert_eq!(node_socket("wg7"), PathBuf::from("/run/rampart/wg7.sock"));
    }
}
