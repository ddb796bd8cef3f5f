//! The network below the mesh: one router, and each host behind a link of its own.
//!
//! ```text
//!   controller           web1                app1                db1
//!   172.31.0.2/24        172.31.1.2/24       172.31.2.2/24       172.31.3.2/24
//!   fd31:0:0:0::2/64     fd31:0:0:1::2/64    fd31:0:0:2::2/64    fd31:0:0:3::2/64
//!        │ veth               │                   │                   │
//!        └────────────────────┴──── router ───────┴───────────────────┘
//! ```

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result};

use crate::namespace::{Lifetime, Namespace};

/// A router and the hosts connected to it.
#[derive(Debug)]
pub struct Underlay {
    router: Namespace,
    hosts: u8,
}

impl Underlay {
    pub fn new(lifetime: Lifetime) -> Result<Self> {
        let router = Namespace::new("router", lifetime)?;
        router.enter(|| {
            fs::write("/proc/sys/net/ipv4/ip_forward", "1").context("failed to turn on IPv4 forwarding")?;
            fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").context("failed to turn on IPv6 forwarding")
        })?;
        Ok(Self { router, hosts: 0 })
    }

    /// The namespace that every packet between hosts crosses.
    pub fn router(&self) -> &Namespace {
        &self.router
    }

    /// The router's end of the link of the host that has this address.
    pub fn port(&self, address: Ipv4Addr) -> String {
        format!("port{}", address.octets()[2])
    }

    /// Connects a host and returns its addresses.
    pub fn connect(&mut self, host: &Namespace) -> Result<(Ipv4Addr, Ipv6Addr)> {
        let n = self.hosts;
        self.hosts += 1;
        let (v4, v6) = (Ipv4Addr::new(172, 31, n, 2), Ipv6Addr::new(0xfd31, 0, 0, n.into(), 0, 0, 0, 2));
        let port = format!("port{n}");
        let pid = host.holder().to_string();
        // From outside: the holder's id means nothing to an `ip` inside the router's process namespace.
        run(
            "nsenter",
            &[
                "--target",
                &self.router.holder().to_string(),
                "--net",
                "ip",
                "link",
                "add",
                &port,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                &pid,
            ],
        )?;
        let router4 = format!("172.31.{n}.1");
        let router6 = format!("fd31:0:0:{n:x}::1");
        self.router.run("ip", &["address", "add", &format!("{router4}/24"), "dev", &port])?;
        self.router.run("ip", &["-6", "address", "add", &format!("{router6}/64"), "dev", &port, "nodad"])?;
        self.router.run("ip", &["link", "set", &port, "up"])?;
        host.run("ip", &["address", "add", &format!("{v4}/24"), "dev", "eth0"])?;
        host.run("ip", &["-6", "address", "add", &format!("{v6}/64"), "dev", "eth0", "nodad"])?;
        host.run("ip", &["link", "set", "eth0", "up"])?;
        host.run("ip", &["route", "add", "default", "via", &router4])?;
        host.run("ip", &["-6", "route", "add", "default", "via", &router6])?;
        Ok((v4, v6))
    }
}

fn run(program: &str, args: &[&str]) -> Result<()> {
    let output = std::process::Command::new(program)
        .args(args)
        .output()
        .with_context(|| format!("failed to start `{program}`"))?;
    anyhow::ensure!(
        output.status.success(),
        "`{program} {}`: {}",
        args.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
