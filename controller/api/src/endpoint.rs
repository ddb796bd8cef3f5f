//! Where a controller is reached: a name or an address, and a port.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use crate::defaults::CONTROLLER_PORT;

/// `controller.example:7443`, `192.0.2.1`, `[2001:db8::1]:7443`. Without a port it is [`CONTROLLER_PORT`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ControllerEndpoint {
    host: String,
    port: u16,
}

/// A text that is no endpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "endpoint `{value}` {reason}; write `HOST:PORT`, as `controller.example:7443`, `192.0.2.1:7443` or `[2001:db8::1]:7443`"
)]
pub struct EndpointError {
    value: String,
    reason: &'static str,
}

/// Longest name in the DNS.
const HOST_MAX: usize = 253;

impl ControllerEndpoint {
    /// A name, an IPv4 address, or an IPv6 address without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    pub fn port(&self) -> u16 {
        self.port
    }
}

impl FromStr for ControllerEndpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = |reason| EndpointError { value: text.to_owned(), reason };
        let (host, port) = split(text).map_err(error)?;
        let port = match port {
            None => CONTROLLER_PORT,
            Some(port) => match port.parse::<u16>() {
                Ok(port) if port > 0 => port,
                _ => return Err(error("has a port that is not a number from 1 to 65535")),
            },
        };
        Ok(Self { host: host.to_owned(), port })
    }
}

/// The host, and the port's text if there is one.
fn split(text: &str) -> Result<(&str, Option<&str>), &'static str> {
    if let Some(rest) = text.strip_prefix('[') {
        let (host, rest) = rest.split_once(']').ok_or("lacks the closing bracket")?;
        host.parse::<Ipv6Addr>().map_err(|_| "has something other than an IPv6 address in brackets")?;
        return match rest.strip_prefix(':') {
            Some(port) => Ok((host, Some(port))),
            None if rest.is_empty() => Ok((host, None)),
            None => Err("has text after the closing bracket"),
        };
    }
    if text.parse::<Ipv6Addr>().is_ok() {
        return Ok((text, None));
    }
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (text, None),
    };
    check_host(host)?;
    Ok((host, port))
}

fn check_host(host: &str) -> Result<(), &'static str> {
    if host.is_empty() {
        return Err("names no host");
    }
    if host.contains("//") || host.contains('/') {
        return Err("is an address of a page, not of a host");
    }
    if host.len() > HOST_MAX {
        return Err("has a name of more than 253 characters");
    }
    if host.parse::<IpAddr>().is_ok() {
        return Ok(());
    }
    if host.chars().all(|c| c.is_ascii_digit() || c == '.') {
        return Err("has something like an IPv4 address that is none");
    }
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if host.strip_suffix('.').unwrap_or(host).split('.').all(label) {
        Ok(())
    } else {
        Err("has a name with characters or labels that no host has")
    }
}

impl fmt::Display for ControllerEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_print_as_they_parse() {
        for (text, printed) in [
            ("controller.example:7443", "controller.example:7443"),
            ("controller.example", "controller.example:7443"),
            ("localhost:1", "localhost:1"),
            ("192.0.2.1:80", "192.0.2.1:80"),
            ("[2001:db8::1]:80", "[2001:db8::1]:80"),
            ("[2001:db8::1]", "[2001:db8::1]:7443"),
            ("2001:db8::1", "[2001:db8::1]:7443"),
        ] {
            let endpoint: ControllerEndpoint = text.parse().expect(text);
            assert_eq!(endpoint.to_string(), printed);
            assert_eq!(printed.parse::<ControllerEndpoint>().as_ref(), Ok(&endpoint));
        }
    }

    #[test]
    fn what_is_no_endpoint_is_refused() {
        for text in [
            "",
            ":7443",
            "host:",
            "host:0",
            "host:65536",
            "host:x",
            "https://host:7443",
            "host/path",
            "[host]:1",
            "[::1",
            "[::1]x",
            "192.0.2.256:80",
            "a b:1",
            "-a:1",
            "a..b:1",
        ] {
            let error = text.parse::<ControllerEndpoint>().expect_err(text).to_string();
            assert!(error.contains(&format!("`{text}`")) && error.contains("HOST:PORT"), "{error}");
        }
    }
}
