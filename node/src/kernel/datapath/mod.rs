//! The eBPF half of the interface: programs, tables, counters and records in the kernel, by aya.
//!
//! Everything lives in pins below [`DEFAULT_ROOT`], so that enforcement goes on without the agent, however it ended:
//!
//! ```text
//! <bpffs>/rampart/v<ABI>/net-<namespace>/<interface>/maps/      the tables, counters, records and events
//!                                                   /programs/  egress, ingress: to know our own again
//!                                                   /links/     egress, ingress: with TCX, what keeps them attached
//! ```
//!
//! `attach` goes through: folders, maps (a new map is empty, and empty tables drop everything), programs, links, pins of
//! the programs. Another version's pins are taken over (`predecessor`). Each step leaves what the next `attach` takes up, wherever it is killed. A running program is replaced by
//! one call of the kernel, and both work on the same maps, so that no packet sees neither.

pub(crate) mod attach;
pub(crate) mod count;
pub(crate) mod events;
mod inspect;
pub mod packet;
mod probe;
pub(crate) mod program;
mod records;
pub(crate) mod sys;
pub(crate) mod tables;
mod trace;
mod upgrade;
mod verifier;

use std::path::PathBuf;

use aya::Ebpf;
use ebpf_common::{EGRESS, INGRESS};
use ipnet::IpNet;
use nix::net::if_::if_nametoindex;
use policy::{Generation, Revision};

use self::attach::early_drop::EarlyDropProgram;
use self::attach::pin::{self, Pins};
use self::attach::pinned::{is_enforced, is_pinned_first, pinned_program};
use self::attach::{Attached, Hook, POLICY};
use self::count::counters::CounterMaps;
use self::program::{Instance, classifier};
use self::records::flows::Flows;
use self::tables::copies::Copies;
use self::tables::map::{self, Held};
use self::upgrade::description::Description;
use self::upgrade::predecessor::{self, Predecessors};
use super::{AttachMethod, Datapath, DatapathState, KernelError};
use crate::lower::Tables;
use host::error::chain;

pub use attach::pin::DEFAULT_ROOT;
pub use events::{EventStream, Events};
pub use inspect::TableReader;
pub use probe::{Probe, SHORTEST};
pub use program::BENCH_OBJECT;
pub use sys::monotonic_ns;
pub use trace::Trace;
pub use verifier::{Outcome as VerifierOutcome, Verified, verified};

/// The datapath of one interface in the network namespace of the thread that calls it.
pub struct EbpfDatapath {
    interface: String,
    pin_root: PathBuf,
    forced: Option<AttachMethod>,
    trace: Option<Box<dyn FnMut(Trace) + Send>>,
    early_drop: EarlyDropProgram,
    running: Option<Running>,
    staged: Option<Staged>,
    probe: Option<Probe>,
}

/// What this process has attached.
struct Running {
    pins: Pins,
    maps: Held,
    copies: Copies,
    counters: CounterMaps,
    flows: Flows,
    method: AttachMethod,
    egress: Loaded,
    ingress: Loaded,
}

/// What this process has loaded, and not attached yet.
struct Prepared {
    egress: Ebpf,
    ingress: Ebpf,
    copies: Copies,
    counters: CounterMaps,
    flows: Flows,
}

/// Ready to take the place of another version's programs as soon as there is a policy: until then that one's is in force.
struct Staged {
    pins: Pins,
    predecessor: Pins,
    prepared: Prepared,
}

/// An instance of the program in its place.
struct Loaded {
    ebpf: Ebpf,
    id: u32,
    attached: Attached,
}

impl std::fmt::Debug for EbpfDatapath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EbpfDatapath")
            .field("interface", &self.interface)
            .field("pin_root", &self.pin_root)
            .field("attached", &self.running.is_some())
            .finish_non_exhaustive()
    }
}

impl EbpfDatapath {
    /// Touches nothing yet. `pin_root` is where bpffs is mounted: [`DEFAULT_ROOT`] but in tests.
    pub fn new(interface: impl Into<String>, pin_root: impl Into<PathBuf>) -> Self {
        Self {
            interface: interface.into(),
            pin_root: pin_root.into(),
            forced: None,
            trace: None,
            early_drop: EarlyDropProgram::default(),
            running: None,
            staged: None,
            probe: None,
        }
    }

    /// Attaches in this way, or fails; otherwise by TCX where the kernel has it.
    pub fn with_attachment(self, attachment: AttachMethod) -> Self {
        Self { forced: Some(attachment), ..self }
    }

    /// Drops at XDP what could not pass in any case.
    pub fn with_early_drop(mut self, wanted: bool) -> Self {
        self.early_drop.wanted = wanted;
        self
    }

    /// Loads the programs so that they report every packet. `receive` gets the log of each instance as it is attached,
    /// on the thread that calls [`Datapath::attach`].
    pub fn with_trace(self, receive: impl FnMut(Trace) + Send + 'static) -> Self {
        Self { trace: Some(Box::new(receive)), ..self }
    }

    fn running(&mut self) -> Result<&mut Running, KernelError> {
        if let Some(Staged { predecessor, .. }) = &self.staged {
            return Err(KernelError::new(format!(
                "the policy in force is that of a `noded` with version {} of the tables, until this one has a policy",
                predecessor.version
            )));
        }
        let interface = &self.interface;
        self.running
            .as_mut()
            .ok_or_else(|| KernelError::new(format!("the datapath of `{interface}` is not attached yet")))
    }

    fn index(&self) -> Result<u32, KernelError> {
        let interface = self.interface.as_str();
        if_nametoindex(interface).map_err(|error| {
            KernelError::with(format!("there is no interface `{interface}` to attach the policy to"), error)
        })
    }

    /// Loads both programs and puts them in place. If another version's are there, only when there is a policy, unless
    /// `at_once`.
    fn attach_anew(&mut self, pins: Pins, index: u32, at_once: bool) -> Result<(), KernelError> {
        pins.create()?;
        let complete = map::check_layouts(&pins.maps)?;
        probe::clean(&pins.top)
            .map_err(|error| KernelError::with(format!("failed to clean up in `{}`", pins.top.display()), error))?;
        if self.running.is_some() {
            return self.replace(index);
        }
        let mut prepared = self.prepare(&pins)?;
        // A table that was lost is empty now, and contradicts the others. Maps without programs are of a predecessor's
        // interface, or of a namespace that had this one's number.
        let anew = !complete || !is_enforced(&self.hooks(index), &pins)?;
        if anew {
            prepared.copies.close()?;
            prepared.flows.clear()?;
            let predecessors = Predecessors::find(&self.pin_root, &self.interface)?;
            if let Some(predecessor) = predecessors.in_force(&self.hooks(index))?.filter(|_| !at_once) {
                let version = predecessor.version;
                tracing::info!(
                    version,
                    "the policy of another version of the tables stays in force until there is one"
                );
                self.staged = Some(Staged { pins, predecessor: predecessor.clone(), prepared });
                return Ok(());
            }
        }
        self.go_in_place(pins, index, prepared, anew)
    }

    /// Programs that run already go on while the new ones are loaded.
    fn prepare(&mut self, pins: &Pins) -> Result<Prepared, KernelError> {
        let egress = self.load(EGRESS, pins)?;
        let ingress = self.load(INGRESS, pins)?;
        Description::pin(pins)?;
        Ok(Prepared {
            egress,
            ingress,
            copies: Copies::open(&pins.maps, true)?,
            counters: CounterMaps::open(&pins.maps)?,
            flows: Flows::open(&pins.maps)?,
        })
    }

    /// Puts new programs in the place of this process's own. Those are let go one by one, each when its successor is in
    /// place: they may be held by nothing but this process.
    fn replace(&mut self, index: u32) -> Result<(), KernelError> {
        let Some(mut running) = self.running.take() else { return Ok(()) };
        let replaced = self.replace_in(&mut running, index);
        self.running = Some(running);
        self.probe = None;
        replaced
    }

    fn replace_in(&mut self, running: &mut Running, index: u32) -> Result<(), KernelError> {
        let egress = self.load(EGRESS, &running.pins)?;
        let ingress = self.load(INGRESS, &running.pins)?;
        Description::pin(&running.pins)?;
        let predecessors = Predecessors::find(&self.pin_root, &self.interface)?;
        let Running { pins, egress: our_egress, ingress: our_ingress, .. } = running;
        let mut method = self.forced.or(Some(running.method));
        for (ebpf, hook, ours) in [egress, ingress]
            .into_iter()
            .zip(self.hooks(index))
            .zip([our_egress, our_ingress])
            .map(|((a, b), c)| (a, b, c))
        {
            *ours = attach_program(ebpf, &hook, pins, &predecessors, &mut method)?;
            ours.pin(pins, hook.direction)?;
            hook.detach(&pins.link(hook.direction), method)?;
        }
        self.early_drop.keep(pins, index)
    }

    /// Attaches what was prepared over what other processes left, if anything. With `anew` the tables were emptied just
    /// before.
    fn go_in_place(&mut self, pins: Pins, index: u32, prepared: Prepared, anew: bool) -> Result<(), KernelError> {
        let Prepared { egress, ingress, mut copies, mut counters, mut flows } = prepared;
        let mut method = self.forced;
        let predecessors = Predecessors::find(&self.pin_root, &self.interface)?;
        let [egress_hook, ingress_hook] = self.hooks(index);
        let mut egress = attach_program(egress, &egress_hook, &pins, &predecessors, &mut method)?;
        egress.pin(&pins, EGRESS)?;
        let mut ingress = attach_program(ingress, &ingress_hook, &pins, &predecessors, &mut method)?;
        ingress.pin(&pins, INGRESS)?;
        for hook in [egress_hook, ingress_hook] {
            hook.detach(&pins.link(hook.direction), method)?;
        }
        if anew {
            // A packet that the predecessor's programs still judged by the predecessor's tables may have left a record.
            copies.settle()?;
            flows.clear()?;
        }
        if !predecessors.is_empty() {
            // Until no packet is counted by the predecessor's programs any more.
            sys::wait_for_readers()
                .map_err(|error| KernelError::with("failed to wait for an RCU grace period", error))?;
            predecessors.succeed(&pins, &mut counters, (!anew).then_some(&mut flows));
        }
        let method = method.unwrap_or(AttachMethod::Tcx);
        let maps = Held::open(&pins.maps)?;
        self.early_drop.keep(&pins, index)?;
        self.running = Some(Running { pins, maps, copies, counters, flows, method, egress, ingress });
        self.probe = None;
        Ok(())
    }

    /// Puts the first policy in force over that of another version: the tables are filled before any packet sees them.
    fn take_over(&mut self, mut staged: Staged, tables: &Tables) -> Result<Generation, KernelError> {
        let index = self.index()?;
        let generation = match staged.prepared.copies.switch(tables) {
            Ok(generation) => generation,
            Err(error) => {
                // Nothing was touched that enforces.
                self.staged = Some(staged);
                return Err(error);
            }
        };
        let Staged { pins, predecessor, mut prepared } = staged;
        if let Err(error) = predecessor::adopt_flows(&predecessor, &mut prepared.flows, true) {
            let version = predecessor.version;
            tracing::warn!(version, error = chain(&error), "records of flows cannot be taken over");
        }
        self.go_in_place(pins, index, prepared, false)?;
        Ok(generation)
    }

    fn load(&mut self, direction: u32, pins: &Pins) -> Result<Ebpf, KernelError> {
        let trace = self.trace.is_some();
        let mut ebpf =
            Instance { direction, trace, tables: &pins.maps, state: &pins.maps, small: false, every: false }.load()?;
        if let Some(receive) = &mut self.trace {
            receive(Trace::new(&mut ebpf, direction)?);
        }
        Ok(ebpf)
    }

    fn hooks(&self, index: u32) -> [Hook<'_>; 2] {
        [EGRESS, INGRESS].map(|direction| Hook { interface: &self.interface, index, direction, owner: &POLICY })
    }

    /// Whether our programs are in place, first, and pinned: egress, ingress. Not where the interface is gone.
    fn in_place(&self) -> Result<[bool; 2], KernelError> {
        let Ok(index) = self.index() else { return Ok([false; 2]) };
        let hooks = self.hooks(index);
        if let Some(staged) = &self.staged {
            return predecessor::in_place(&staged.predecessor, &hooks);
        }
        let Some(running) = &self.running else {
            let pins = Pins::new(&self.pin_root, &self.interface)?;
            return Ok([is_pinned_first(&hooks[0], &pins)?, is_pinned_first(&hooks[1], &pins)?]);
        };
        let maps = running.maps.are_pinned(&running.pins.maps);
        let check = |hook: &Hook<'_>, loaded: &Loaded| {
            let pinned = maps
                && (hook.direction == EGRESS || self.early_drop.is_settled(&running.pins))
                && loaded.attached.is_pinned(&running.pins.link(hook.direction))
                && pinned_program(&running.pins, hook.direction) == Some(loaded.id);
            Ok::<bool, KernelError>(pinned && hook.has(running.method, loaded.id)?)
        };
        Ok([check(&hooks[0], &running.egress)?, check(&hooks[1], &running.ingress)?])
    }
}

/// Attaches a loaded program.
fn attach_program(
    mut ebpf: Ebpf,
    hook: &Hook<'_>,
    pins: &Pins,
    predecessors: &Predecessors,
    method: &mut Option<AttachMethod>,
) -> Result<Loaded, KernelError> {
    let id = program::id(&mut ebpf)?;
    let program = classifier(&mut ebpf)?;
    let attached = hook.attach(program, &pins.link(hook.direction), &predecessors.links(hook.direction), method)?;
    Ok(Loaded { ebpf, id, attached })
}

impl Loaded {
    /// Lets others know it again.
    fn pin(&mut self, pins: &Pins, direction: u32) -> Result<(), KernelError> {
        let program = classifier(&mut self.ebpf)?;
        pin::replace(&pins.program(direction), |path| program.pin(path))
    }
}

impl Datapath for EbpfDatapath {
    fn attach(&mut self) -> Result<(), KernelError> {
        let index = self.index()?;
        let pins = Pins::new(&self.pin_root, &self.interface)?;
        if let Some(running) = &self.running {
            if running.pins.top != pins.top {
                return Err(KernelError::new("the datapath belongs to another network namespace than this thread"));
            }
            pins.create()?;
            running.maps.pin_again(&pins.maps)?;
            if self.in_place()? == [true; 2] {
                return Ok(());
            }
        }
        // Whatever breaks while another version enforces: nothing passes that nobody judges.
        let at_once = match &self.staged {
            Some(_) if self.in_place()? == [true; 2] => return Ok(()),
            staged => staged.is_some(),
        };
        self.staged = None;
        self.attach_anew(pins, index, at_once)
    }

    fn observe(&mut self) -> Result<DatapathState, KernelError> {
        let [egress, ingress] = self.in_place()?;
        let attachment = match &self.running {
            Some(running) => running.method,
            None => self.forced.unwrap_or(AttachMethod::Tcx),
        };
        let (generation, revision) = match (&self.running, &self.staged) {
            (Some(running), _) => running.copies.in_force()?,
            (None, Some(staged)) => predecessor::in_force(&staged.predecessor),
            (None, None) => {
                let pins = Pins::new(&self.pin_root, &self.interface)?;
                if !pins.map(ebpf_common::map::CONTROL).exists() || !pins.map(ebpf_common::map::TABLES).exists() {
                    (Generation(0), Revision(0))
                } else {
                    Copies::open(&pins.maps, false)?.in_force()?
                }
            }
        };
        // Whether somebody got ahead matters only where ours is not first.
        let ahead = if egress && ingress { Vec::new() } else { self.ahead()? };
        Ok(DatapathState {
            attachment,
            egress,
            ingress,
            ahead,
            generation,
            revision,
            early_drop: self.early_drop.state(),
        })
    }

    fn switch(&mut self, tables: &Tables) -> Result<Generation, KernelError> {
        match self.staged.take() {
            Some(staged) => self.take_over(staged, tables),
            None => self.running()?.copies.switch(tables),
        }
    }

    fn settle(&mut self) -> Result<(), KernelError> {
        self.running()?.copies.settle()
    }

    fn distrust(&mut self) {
        if let Some(running) = &mut self.running {
            running.copies.distrust();
        }
    }

    fn forget_flows(&mut self, addresses: &[IpNet]) -> Result<usize, KernelError> {
        // Until no packet is judged by the predecessor's tables, records of theirs may come.
        self.settle()?;
        self.running()?.flows.forget(addresses)
    }

    fn collect_flows(&mut self) -> Result<usize, KernelError> {
        // Off the path of any change, which is a good moment.
        self.settle()?;
        self.running()?.flows.collect(sys::monotonic_ns())
    }

    fn detach(&mut self) -> Result<(), KernelError> {
        let pins = Pins::new(&self.pin_root, &self.interface)?;
        self.probe = None;
        self.running = None;
        self.early_drop.remove(&pins)?;
        self.staged = None;
        for direction in [EGRESS, INGRESS] {
            match self.index() {
                Ok(index) => Hook { interface: &self.interface, index, direction, owner: &POLICY }
                    .detach(&pins.link(direction), None)?,
                Err(_) => pin::remove_file(&pins.link(direction))?,
            }
        }
        Predecessors::find(&self.pin_root, &self.interface)?.remove()?;
        pins.remove()
    }
}
