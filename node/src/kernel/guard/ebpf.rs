//! The guard on the underlay, in the kernel: an object of its own on each interface by which peers' packets arrive.
//!
//! ```text
//! <bpffs>/rampart/v<ABI>/net-<namespace>/<WireGuard interface>/guard-v<version>/maps/       what all places share
//!                                                             /guard-v<version>/at/<interface>/  counters, tcx or xdp link
//! ```
//!
//! As the policy's programs it outlives the agent, and the next agent's takes its place without a gap. Other than they it does
//! not insist on being first: the interface is not ours. It begins ahead of whatever is there and lets everything pass on that
//! it does not drop; what others put ahead of it later is counted and left.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use aya::Ebpf;
use aya::programs::xdp::XdpMode;
use ebpf_common::counter::Counter;
use ebpf_common::{INGRESS, underlay};
use netlink_packet_route::link::LinkLayerType;

use super::load::{self, Program};
use super::maps::{self, Counters, Shared};
use super::{GuardAttachment, Interfaces, Kept, Mode, Wanted};
use crate::kernel::datapath::attach::pin::{self, Pins, create_folder};
use crate::kernel::datapath::attach::xdp::{self, HeldXdp};
use crate::kernel::datapath::attach::{Attached, GUARD, Hook};
use crate::kernel::datapath::events::Events;
use crate::kernel::link::netlink::{FoundLink, Netlink};
use crate::kernel::{AttachMethod, Guard, KernelError, guard};
use host::error::chain;

/// Begins the names of the guard's folders, of whatever version.
const FOLDER: &str = "guard-v";

/// The guard of one WireGuard interface, in the network namespace of the thread that made it.
pub struct EbpfGuard {
    interface: String,
    pin_root: PathBuf,
    forced: Option<AttachMethod>,
    netlink: Netlink,
    shared: Option<Shared>,
    placed: BTreeMap<String, Placed>,
    defaults: Defaults,
}

/// What this process has attached to an interface.
struct Placed {
    _ebpf: Ebpf,
    index: u32,
    program: u32,
    asked: Mode,
    held: Held,
    counters: Counters,
    note: Option<String>,
}

enum Held {
    Tc(Attached, AttachMethod),
    Xdp(HeldXdp),
}

/// Where the default routes lead. The routing table is read whole, which must not become what this machine does.
#[derive(Default)]
struct Defaults {
    names: BTreeSet<String>,
    again: Option<Instant>,
}

/// One part in so many of the time may go into reading routes.
const TIME_FOR_ROUTES: u32 = 100;

impl std::fmt::Debug for EbpfGuard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EbpfGuard").field("placed", &self.placed.keys()).finish_non_exhaustive()
    }
}

impl EbpfGuard {
    /// Touches nothing yet. Not from within a runtime: netlink has one of its own.
    pub fn new(interface: impl Into<String>, pin_root: impl Into<PathBuf>) -> Result<Self, KernelError> {
        Ok(Self {
            interface: interface.into(),
            pin_root: pin_root.into(),
            forced: None,
            netlink: Netlink::new()?,
            shared: None,
            placed: BTreeMap::new(),
            defaults: Defaults::default(),
        })
    }

    /// At TC attaches in this way, or fails; otherwise by TCX where the kernel has it.
    pub fn with_attachment(self, attachment: AttachMethod) -> Self {
        Self { forced: Some(attachment), ..self }
    }

    fn folders(&self) -> Result<Folders, KernelError> {
        Ok(Folders::new(Pins::new(&self.pin_root, &self.interface)?))
    }

    fn try_keep(&mut self, wanted: &Wanted) -> Result<Kept, KernelError> {
        let folders = self.folders()?;
        let names = match &wanted.interfaces {
            Interfaces::These(names) => names.clone(),
            Interfaces::Auto => self.default_interfaces()?,
        };
        self.leave_others(&folders, &names)?;
        let mut kept = Kept::default();
        if names.is_empty() {
            kept.error = Some("no default route leads anywhere: name the interfaces in `[guard]`".to_owned());
            return Ok(kept);
        }
        if self.shared.is_none() {
            folders.pins.create()?;
            folders.remove_other_versions()?;
            maps::remove_others(&folders)?;
            create_folder(&folders.maps)?;
        }
        for name in names {
            let place = self.place(&folders, &name, wanted, &mut kept.repaired).unwrap_or_else(|error| {
                GuardAttachment { interface: name.clone(), hook: None, ahead: 0, note: Some(chain(&error)) }
            });
            kept.attachments.push(place);
        }
        if let Some(shared) = &mut self.shared {
            shared.write(wanted, &self.netlink.own_addresses()?)?;
        }
        Ok(kept)
    }

    /// Puts the guard on one interface, or sees that it is there.
    fn place(
        &mut self,
        folders: &Folders,
        name: &str,
        wanted: &Wanted,
        repaired: &mut usize,
    ) -> Result<GuardAttachment, KernelError> {
        let Some(link) = self.netlink.find_link(name)? else {
            self.placed.remove(name);
            return Err(KernelError::new("there is no such interface"));
        };
        let here = self.placed.get(name).filter(|placed| placed.index == link.index);
        let lost = match here {
            Some(placed) if placed.asked == wanted.mode => !placed.is_there(folders, name)?,
            _ => false,
        };
        if lost || here.is_none_or(|placed| placed.asked != wanted.mode) {
            let placed = self.attach(folders, name, &link, wanted.mode)?;
            self.placed.insert(name.to_owned(), placed);
            *repaired += usize::from(lost);
        }
        if self.shared.is_none() {
            self.shared = Some(Shared::open(&folders.maps)?);
        }
        let placed = &self.placed[name];
        Ok(GuardAttachment {
            interface: name.to_owned(),
            hook: Some(placed.hook()),
            ahead: placed.ahead(name)?,
            note: placed.note.clone(),
        })
    }

    /// The hook asked for, or the next best.
    fn attach(&self, folders: &Folders, name: &str, link: &FoundLink, asked: Mode) -> Result<Placed, KernelError> {
        let at = folders.at(name);
        create_folder(&at)?;
        let link_header = link_header(link.layer)?;
        let load = |program| load::load(program, link_header, &folders.maps, &at);
        let hook = hook(name, link.index);
        let mut note = None;
        if asked == Mode::Xdp {
            let mut ebpf = load(Program::Xdp)?;
            match xdp::attach(load::xdp(&mut ebpf)?, link.index, XdpMode::Driver, &xdp_pin(&at)) {
                Ok(held) => {
                    hook.detach(&tcx_pin(&at), None)?;
                    let program = load::id(load::xdp(&mut ebpf)?.info())?;
                    let counters = Counters::open(&at)?;
                    let held = Held::Xdp(held);
                    return Ok(Placed { _ebpf: ebpf, index: link.index, program, asked, held, counters, note });
                }
                Err(error) => note = Some(format!("no XDP in the driver: {}", chain(&error))),
            }
        }
        let mut ebpf = load(Program::Tc)?;
        let mut method = self.forced;
        let attached = hook.attach(load::classifier(&mut ebpf)?, &tcx_pin(&at), &[], &mut method)?;
        let method = method.unwrap_or(AttachMethod::Tcx);
        hook.detach(&tcx_pin(&at), Some(method))?;
        pin::remove_file(&xdp_pin(&at))?;
        let program = load::id(load::classifier(&mut ebpf)?.info())?;
        let counters = Counters::open(&at)?;
        let held = Held::Tc(attached, method);
        Ok(Placed { _ebpf: ebpf, index: link.index, program, asked, held, counters, note })
    }

    fn default_interfaces(&mut self) -> Result<BTreeSet<String>, KernelError> {
        let begin = Instant::now();
        if self.defaults.again.is_none_or(|again| begin >= again) {
            let mut names = self.netlink.default_interfaces()?;
            names.remove(&self.interface);
            let took: Duration = begin.elapsed();
            self.defaults = Defaults { names, again: Some(begin + took * TIME_FOR_ROUTES) };
        }
        Ok(self.defaults.names.clone())
    }

    /// Takes the guard off interfaces that it is no longer wanted on, an earlier process's too.
    fn leave_others(&mut self, folders: &Folders, wanted: &BTreeSet<String>) -> Result<(), KernelError> {
        for name in folders.places()? {
            if !wanted.contains(&name) {
                self.leave(folders, &name)?;
            }
        }
        self.placed.retain(|name, _| wanted.contains(name));
        Ok(())
    }

    fn leave(&mut self, folders: &Folders, name: &str) -> Result<(), KernelError> {
        self.placed.remove(name);
        let at = folders.at(name);
        match self.netlink.find_link(name)? {
            Some(link) => hook(name, link.index).detach(&tcx_pin(&at), None)?,
            None => pin::remove_file(&tcx_pin(&at))?,
        }
        remove_folder(&at)
    }
}

impl Placed {
    fn hook(&self) -> guard::Hook {
        match &self.held {
            Held::Xdp(_) => guard::Hook::Xdp,
            Held::Tc(_, AttachMethod::Tcx) => guard::Hook::Tcx,
            Held::Tc(_, AttachMethod::Clsact) => guard::Hook::Clsact,
        }
    }

    /// Whether it is attached, and would be without this process.
    fn is_there(&self, folders: &Folders, name: &str) -> Result<bool, KernelError> {
        let at = folders.at(name);
        match &self.held {
            Held::Xdp(held) => Ok(held.is_there(&xdp_pin(&at), self.index, self.program)),
            Held::Tc(attached, method) => {
                Ok(attached.is_pinned(&tcx_pin(&at)) && hook(name, self.index).has(*method, self.program)?)
            }
        }
    }

    /// Programs of others that run before it.
    fn ahead(&self, name: &str) -> Result<usize, KernelError> {
        let Held::Tc(_, method) = &self.held else { return Ok(0) };
        let programs = hook(name, self.index).programs(*method)?;
        Ok(programs.iter().take_while(|program| **program != Some(self.program)).count())
    }
}

impl Guard for EbpfGuard {
    fn keep(&mut self, wanted: Option<&Wanted>) -> Kept {
        let kept = match wanted {
            Some(wanted) => self.try_keep(wanted),
            None => self.detach().map(|()| Kept::default()),
        };
        kept.unwrap_or_else(|error| Kept { error: Some(chain(&error)), ..Kept::default() })
    }

    fn counters(&mut self) -> Result<BTreeMap<(String, u8), Counter>, KernelError> {
        let mut all = BTreeMap::new();
        for (name, placed) in &self.placed {
            let counters = placed.counters.read()?;
            all.extend(counters.into_iter().map(|(reason, counter)| ((name.clone(), reason), counter)));
        }
        Ok(all)
    }

    fn detach(&mut self) -> Result<(), KernelError> {
        let folders = self.folders()?;
        self.leave_others(&folders, &BTreeSet::new())?;
        self.shared = None;
        folders.remove_other_versions()?;
        remove_folder(&folders.top)
    }
}

impl Events<underlay::Event> {
    /// Of the guard of a WireGuard interface in the network namespace of the calling thread, once it stands somewhere.
    pub fn open_guard(interface: &str, pin_root: &Path) -> Result<Self, KernelError> {
        Self::open_guard_in(&Folders::new(Pins::new(pin_root, interface)?).maps)
    }
}

/// The folders of the guard's pins.
#[derive(Debug)]
pub(super) struct Folders {
    pub(super) pins: Pins,
    pub(super) top: PathBuf,
    pub(super) maps: PathBuf,
}

impl Folders {
    pub(super) fn new(pins: Pins) -> Self {
        let top = pins.top.join(format!("{FOLDER}{}", underlay::VERSION));
        Self { maps: top.join("maps"), top, pins }
    }

    /// Of one interface.
    pub(super) fn at(&self, name: &str) -> PathBuf {
        // bpffs reserves dots. No interface has a colon in its name.
        self.top.join("at").join(name.replace('.', ":"))
    }

    /// Interfaces that have pins.
    pub(super) fn places(&self) -> Result<BTreeSet<String>, KernelError> {
        let names = entries(&self.top.join("at"))?;
        Ok(names.into_iter().map(|name| name.replace(':', ".")).collect())
    }

    /// What other builds of `noded` left has a stale idea of the peers: its links go with their pins. (Filters of clsact are
    /// found by their name and replaced.)
    pub(super) fn remove_other_versions(&self) -> Result<(), KernelError> {
        let top = &self.pins.top;
        let (Some(namespace), Some(versions)) = (top.parent(), top.ancestors().nth(3)) else { return Ok(()) };
        let (Some(interface), Some(namespace)) = (top.file_name(), namespace.file_name()) else { return Ok(()) };
        for version in entries(versions)? {
            let other = versions.join(version).join(namespace).join(interface);
            for folder in entries(&other)? {
                let folder = other.join(&folder);
                let is_guard = folder.file_name().is_some_and(|name| name.to_string_lossy().starts_with(FOLDER));
                if is_guard && folder != self.top {
                    remove_folder(&folder)?;
                }
            }
        }
        Ok(())
    }
}

/// Names in a folder that may not be there.
fn entries(folder: &Path) -> Result<Vec<String>, KernelError> {
    let failed = |error| KernelError::with(format!("failed to list `{}`", folder.display()), error);
    match fs::read_dir(folder) {
        Ok(entries) => entries
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<io::Result<_>>()
            .map_err(failed),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(Vec::new()),
        Err(error) => Err(failed(error)),
    }
}

pub(super) fn remove_folder(folder: &Path) -> Result<(), KernelError> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(KernelError::with(format!("failed to remove the pins below `{}`", folder.display()), error))
        }
        _ => Ok(()),
    }
}

fn hook(name: &str, index: u32) -> Hook<'_> {
    Hook { interface: name, index, direction: INGRESS, owner: &GUARD }
}

fn tcx_pin(at: &Path) -> PathBuf {
    at.join("tcx")
}

fn xdp_pin(at: &Path) -> PathBuf {
    at.join("xdp")
}

/// Bytes ahead of the IP header in what arrives on a link of this kind.
fn link_header(layer: LinkLayerType) -> Result<u32, KernelError> {
    match layer {
        LinkLayerType::Ether | LinkLayerType::Loopback => Ok(underlay::ETHERNET),
        LinkLayerType::None
        | LinkLayerType::Rawip
        | LinkLayerType::Ppp
        | LinkLayerType::Tunnel
        | LinkLayerType::Tunnel6
        | LinkLayerType::Sit => Ok(0),
        other => Err(KernelError::new(format!("the guard knows no links of the kind {other:?}, so it is not there"))),
    }
}
