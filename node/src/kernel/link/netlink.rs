//! One route netlink socket and the runtime that drives it, behind blocking calls. A socket answers one dump at a time
//! (a second one gets EBUSY), so calls take turns and every answer is read to its end.

use std::fmt;
use std::io;

use futures_util::TryStreamExt;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use rtnetlink::{Handle, LinkUnspec, LinkWireguard};
use tokio::runtime::{Builder, Runtime};

use super::OWNER;
use crate::kernel::{KernelError, LinkKind};

/// A route netlink socket in the network namespace of the thread that made it.
pub(crate) struct Netlink {
    /// `None` only while being dropped.
    runtime: Option<Runtime>,
    pub(super) handle: Handle,
}

/// A link as the kernel describes it.
#[derive(Clone, Debug)]
pub(crate) struct FoundLink {
    pub(crate) index: u32,
    pub(crate) kind: LinkKind,
    /// The kernel's word for the kind, `device` where it has none.
    pub(crate) kind_name: String,
    /// Whether it carries the mark of [`OWNER`].
    pub(crate) ours: bool,
    pub(crate) up: bool,
    pub(crate) mtu: u32,
    /// What lies ahead of the IP header in what arrives.
    pub(crate) layer: LinkLayerType,
}

/// Why the kernel would not create a WireGuard link.
#[derive(Debug)]
pub(crate) enum RefusedKind {
    /// The kernel has no WireGuard.
    Unsupported,
    Other(io::Error),
}

impl Netlink {
    pub(crate) fn new() -> Result<Self, KernelError> {
        Self::open().map_err(|error| KernelError::with("failed to open a netlink socket", error))
    }

    fn open() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_io().build()?;
        let handle = {
            let _context = runtime.enter();
            // With strict checks the kernel itself filters dumps, which matters beside full routing tables.
            let (connection, handle, _) =
                rtnetlink::new_connection_with_strict_check().or_else(|_| rtnetlink::new_connection())?;
            runtime.spawn(connection);
            handle
        };
        Ok(Self { runtime: Some(runtime), handle })
    }

    /// Waits for an answer, as an error of the operating system where it is one.
    pub(super) fn wait<T>(&self, answer: impl Future<Output = Result<T, rtnetlink::Error>>) -> io::Result<T> {
        let runtime = self.runtime.as_ref().expect("taken only by drop");
        runtime.block_on(answer).map_err(|error| match error {
            rtnetlink::Error::NetlinkError(message) => message.to_io(),
            other => io::Error::other(other),
        })
    }

    pub(crate) fn find_link(&self, name: &str) -> Result<Option<FoundLink>, KernelError> {
        match self.wait(self.handle.link().get().match_name(name).execute().try_collect::<Vec<_>>()) {
            Ok(messages) => Ok(messages.first().map(describe)),
            Err(error) if is(&error, &[libc::ENODEV, libc::ENOENT]) => Ok(None),
            Err(error) => Err(KernelError::with(format!("failed to look up interface `{name}`"), error)),
        }
    }

    /// Tries whether the kernel can make WireGuard links, with one that goes at once.
    pub(crate) fn probe_wireguard(&self) -> Result<(), RefusedKind> {
        // At most 15 bytes, and two processes that try at once do not meet.
        let name = format!("rmpt{}", std::process::id());
        self.create_wireguard(&name).map_err(|error| {
            match is(&error, &[libc::EOPNOTSUPP, libc::ENOTSUP, libc::EAFNOSUPPORT]) {
                true => RefusedKind::Unsupported,
                false => RefusedKind::Other(error),
            }
        })?;
        self.delete_link(&name).map_err(RefusedKind::Other)
    }

    pub(crate) fn create_wireguard(&self, name: &str) -> io::Result<()> {
        self.wait(self.handle.link().add(LinkWireguard::new(name).build()).execute())
    }

    /// Marks the link as ours and keeps the kernel from making link-local addresses on it.
    pub(crate) fn adopt_link(&self, name: &str) -> io::Result<()> {
        self.set_link(LinkUnspec::new_with_name(name).alias(OWNER).build())?;
        let none = vec![AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)])];
        let quiet = LinkUnspec::new_with_name(name).append_extra_attribute(LinkAttribute::AfSpecUnspec(none));
        match self.set_link(quiet.build()) {
            // A kernel without IPv6 makes no such addresses.
            Err(error) if is(&error, &[libc::EAFNOSUPPORT, libc::EOPNOTSUPP, libc::EINVAL]) => Ok(()),
            other => other,
        }
    }

    pub(super) fn set_link(&self, message: LinkMessage) -> io::Result<()> {
        self.wait(self.handle.link().set(message).execute())
    }

    /// Deletes the link; one that is not there is no error.
    pub(crate) fn delete_link(&self, name: &str) -> io::Result<()> {
        let mut request = self.handle.link().del(0);
        request.message_mut().attributes.push(LinkAttribute::IfName(name.to_owned()));
        match self.wait(request.execute()) {
            Err(error) if is(&error, &[libc::ENODEV]) => Ok(()),
            other => other,
        }
    }
}

impl Drop for Netlink {
    fn drop(&mut self) {
        // Dropping a runtime where others run is a panic, this is not.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl fmt::Debug for Netlink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Netlink").finish_non_exhaustive()
    }
}

/// Whether the operating system's error is one of these.
pub(crate) fn is(error: &io::Error, codes: &[i32]) -> bool {
    error.raw_os_error().is_some_and(|code| codes.contains(&code))
}

fn describe(message: &LinkMessage) -> FoundLink {
    let mut found = FoundLink {
        index: message.header.index,
        kind: LinkKind::Foreign,
        kind_name: "device".into(),
        ours: false,
        up: message.header.flags.contains(LinkFlags::Up),
        mtu: 0,
        layer: message.header.link_layer_type,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Mtu(mtu) => found.mtu = *mtu,
            LinkAttribute::IfAlias(alias) => found.ours = alias == OWNER,
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    if let LinkInfo::Kind(kind) = info {
                        found.kind_name = kind.to_string();
                        found.kind = match kind {
                            InfoKind::Wireguard => LinkKind::WireGuard,
                            // A TAP device has this kind too, and Ethernet headers.
                            InfoKind::Tun if message.header.link_layer_type == LinkLayerType::None => LinkKind::Tun,
                            _ => LinkKind::Foreign,
                        };
                    }
                }
            }
            _ => {}
        }
    }
    found
}
