//! The daemon: joins the enforcer, the controller and those who ask, and ends in good order.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::bail;
use controller_api::v1;
use policy::{Slice, Verdict};
use sd_notify::NotifyState;
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Semaphore;

use crate::config::{Metrics, Settings, WIREGUARD_LOG};
use crate::enforce::guard::Watch;
use crate::enforce::{self, Setup};
use crate::kernel::datapath::{EbpfDatapath, Events, TableReader};
use crate::kernel::guard::EbpfGuard;
use crate::kernel::link::NetlinkLink;
use crate::kernel::wireguard::{self, Options};
use crate::kernel::{Link, WireGuard};
use crate::serve::drops::Hub;
use crate::serve::events;
use crate::serve::local::server::{self, Answerer, Records};
use crate::serve::lock::Lock;
use crate::serve::scrape;
use crate::serve::startup;
use crate::uplink::follow;
use crate::uplink::identity::{Identity, Keys};
use crate::uplink::journal::{Journal, Opened};
use crate::uplink::state::State;
use crate::view::explanation;
use crate::view::status::Context;
use crate::view::{
    self, DropFilter, Drops, Explanation, FlowFilter, Flows, Interpreted, Question, Unanswered, Verified,
};
use host::error::chain;
use host::limit;
use host::socket::{PrivateSocket, bind_private};

/// How long the controller's interpreter may take.
const INTERPRETER: Duration = Duration::from_secs(5);
/// How long a change may be on its way from the controller to this node's kernel.
const ON_ITS_WAY: Duration = Duration::from_millis(500);
/// So often are tables read that another generation replaces meanwhile.
const VERIFY_AGAIN: u32 = 5;
/// So often is a difference looked at again.
const EXPLAIN_AGAIN: u32 = 2;
/// Tables and flows that are read or compared at a time, beside the enforcer's thread.
const BESIDE: usize = 2;
/// How long the last commands may take when the daemon ends.
const FAREWELL: Duration = Duration::from_secs(5);
/// Between two attempts to open what only an attached datapath has.
const OPEN_AGAIN: Duration = Duration::from_secs(1);

/// The three halves of the interface and the guard, chosen and checked; nothing is touched yet.
pub struct Machine {
    pub wireguard: Box<dyn WireGuard>,
    pub link: Box<dyn Link>,
    pub datapath: EbpfDatapath,
    pub guard: EbpfGuard,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine").field("datapath", &self.datapath).finish_non_exhaustive()
    }
}

impl Machine {
    /// Checks what is needed of this machine. Not from within a runtime: netlink has one of its own.
    pub fn prepare(settings: &Settings) -> anyhow::Result<Self> {
        startup::check_rights()?;
        let interface = settings.interface.as_str();
        let options = Options { log: Some(settings.state_dir.join(WIREGUARD_LOG)), ..Options::default() };
        let wireguard = wireguard::detect(interface, settings.wireguard, options)?;
        startup::check(settings, wireguard.backend())?;
        let link = Box::new(NetlinkLink::new(interface)?);
        let datapath = EbpfDatapath::new(interface, &settings.bpffs);
        Ok(Self { wireguard, link, datapath, guard: EbpfGuard::new(interface, &settings.bpffs)? })
    }
}

/// Runs until SIGTERM or SIGINT. What is enforced then stays enforced.
pub fn run(settings: Settings, trace_datapath: bool) -> anyhow::Result<()> {
    startup::check_rights()?;
    if let Err(error) = limit::raise_open_files() {
        tracing::debug!(%error, "limit of open files stays as it is");
    }
    let identity = Identity::load(&settings.state_dir)?;
    let _lock = Lock::take(&settings)?;
    let keys = Keys::load(&settings.state_dir)?;
    let machine = Machine::prepare(&settings)?;
    let opened = last_good_state(&settings.state_dir, &identity);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let result = runtime.block_on(serve(settings, identity, keys, machine, opened, trace_datapath));
    runtime.shutdown_timeout(FAREWELL);
    result
}

fn last_good_state(state_dir: &Path, identity: &Identity) -> Opened {
    let opened = Journal::open(state_dir, identity.node);
    match (&opened.state, &opened.error) {
        (Some(state), None) => tracing::info!(revision = %state.slice.revision, "last good state read"),
        (Some(state), Some(error)) => {
            tracing::error!(
                revision = %state.slice.revision,
                error = chain(error),
                "last good state read, though not all that was written"
            );
        }
        (None, None) => tracing::info!("no last good state; everything is denied until the controller answers"),
        (None, Some(error)) => {
            tracing::error!(
                error = chain(error),
                "last good state refused; the controller will be asked for a new one"
            );
        }
    }
    opened
}

async fn serve(
    settings: Settings,
    identity: Identity,
    keys: Keys,
    machine: Machine,
    opened: Opened,
    trace_datapath: bool,
) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let scrapes = match settings.metrics {
        Metrics::Off => None,
        Metrics::At(address) => Some(host::scrape::bind(address).await?),
    };
    let PrivateSocket { listener: socket, file: _socket_file } = bind_private(&settings.socket)?;

    let held = opened.state.as_ref().map(|state| Arc::clone(&state.slice));
    let enforcer = enforce::start(setup(&settings, keys, machine, opened, trace_datapath));
    if let Some(slice) = held.clone() {
        enforcer.ask(move |enforcer| enforcer.resume(slice)).await?;
    }
    if let Some(error) = enforcer.ask(unattached).await? {
        bail!(error);
    }
    let controller = follow::start(&settings, held, enforcer.enforced.clone());
    let agent = Arc::new(Agent {
        settings,
        identity,
        enforcer,
        controller,
        drops: Hub::default(),
        beside: Arc::new(Semaphore::new(BESIDE)),
    });
    agent.start(socket, scrapes);
    let _ = sd_notify::notify(&[NotifyState::Ready]);
    tracing::info!(interface = %agent.settings.interface, node = %agent.identity.name, "running");

    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    tracing::info!("stopping; what is enforced stays enforced");
    // What was begun is finished.
    let _ = tokio::time::timeout(FAREWELL, agent.enforcer.ask(|_| ())).await;
    Ok(())
}

fn setup(settings: &Settings, keys: Keys, machine: Machine, opened: Opened, trace_datapath: bool) -> Setup {
    let Machine { wireguard, link, datapath, guard } = machine;
    let mut datapath = datapath.with_early_drop(settings.early_drop);
    if trace_datapath {
        let runtime = tokio::runtime::Handle::current();
        datapath = datapath.with_trace(move |trace| {
            runtime.spawn(async move {
                if let Err(error) = trace.run().await {
                    tracing::warn!(%error, "trace of the datapath ended");
                }
            });
        });
    }
    let Opened { journal, state, error: _ } = opened;
    let (slots, holders, time) = match state {
        Some(State { slice: _, slots, holders, time }) => (Some(slots), holders, time),
        None => (None, Default::default(), 0),
    };
    Setup {
        wireguard,
        link,
        datapath: Box::new(datapath),
        guard: Watch::new(Box::new(guard), settings.guard.clone()),
        key: keys.wireguard,
        journal,
        listen_port: settings.listen_port,
        mtu: settings.mtu,
        persistent_keepalive: settings.persistent_keepalive,
        reconcile_interval: settings.reconcile_interval,
        slots,
        holders,
        time,
    }
}

/// Why the daemon cannot begin: without an attached datapath there is nothing to run for.
fn unattached(enforcer: &mut enforce::Enforcer) -> Option<String> {
    enforcer.error.clone().filter(|_| !enforcer.attached)
}

struct Agent {
    settings: Settings,
    identity: Identity,
    enforcer: enforce::Handle,
    controller: follow::Handle,
    drops: Hub,
    /// For work beside the enforcer's thread.
    beside: Arc<Semaphore>,
}

impl Agent {
    fn start(self: &Arc<Self>, socket: UnixListener, scrapes: Option<TcpListener>) {
        tokio::spawn(server::serve(socket, Arc::clone(self)));
        tokio::spawn(Arc::clone(self).pass_on());
        tokio::spawn(Arc::clone(self).report_events());
        tokio::spawn(Arc::clone(self).report_events_of_guard());
        tokio::spawn(Arc::clone(self).verify_again_and_again());
        if let Some(listener) = scrapes {
            let agent = Arc::clone(self);
            let source: host::scrape::Source = Arc::new(move || {
                let agent = Arc::clone(&agent);
                Box::pin(async move {
                    let families = agent.ask(scrape::collect).await.map_err(|error| error.to_string())?;
                    scrape::open_metrics(families).map_err(|error| error.to_string())
                })
            });
            tokio::spawn(host::scrape::serve(listener, source));
        }
    }

    /// From the controller to the enforcer; of slices that come faster than they are put in force, the newest counts.
    async fn pass_on(self: Arc<Self>) {
        let mut received = self.controller.received.clone();
        while received.changed().await.is_ok() {
            let slice = received.borrow_and_update().clone();
            let Some(slice) = slice else { continue };
            if self.enforcer.enforce(slice).is_err() || self.enforcer.ask(|_| ()).await.is_err() {
                tracing::error!("the thread that owns the kernel's interface has ended; what is enforced stays");
                std::process::exit(1);
            }
        }
    }

    async fn report_events(self: Arc<Self>) {
        loop {
            let opened = Events::open(self.settings.interface.as_str(), &self.settings.bpffs);
            match opened
                .map_err(|error| chain(&error))
                .and_then(|events| events.into_stream().map_err(|error| error.to_string()))
            {
                Ok(stream) => {
                    let (interface, names) = (self.settings.interface.as_str(), self.enforcer.names.clone());
                    events::run(stream, interface, names, self.drops.clone()).await;
                }
                Err(error) => tracing::debug!(error, "events cannot be read yet"),
            }
            tokio::time::sleep(OPEN_AGAIN).await;
        }
    }

    /// Its maps are there once it stands somewhere, which may be never.
    async fn report_events_of_guard(self: Arc<Self>) {
        while self.settings.guard.is_some() {
            if let Ok(events) = Events::open_guard(self.settings.interface.as_str(), &self.settings.bpffs)
                && let Ok(stream) = events.into_stream()
            {
                events::run_guard(stream, self.drops.clone()).await;
            }
            tokio::time::sleep(OPEN_AGAIN).await;
        }
    }

    /// The first time after a whole interval: at the start the tables were only just written.
    async fn verify_again_and_again(self: Arc<Self>) {
        loop {
            tokio::time::sleep(self.settings.verify_interval).await;
            if let Err(error) = self.verify().await {
                tracing::debug!(%error, "the tables cannot be verified now");
            }
        }
    }

    /// Holds the kernel's tables against the policy. Tables that differ are written anew.
    async fn verify(&self) -> Result<Verified, Unanswered> {
        for _ in 0..VERIFY_AGAIN {
            let expected = self.ask(|enforcer, _| enforcer.expected()).await?;
            let (interface, bpffs) = (self.settings.interface.to_string(), self.settings.bpffs.clone());
            let check = self.beside(move || {
                let reader = TableReader::open(&interface, &bpffs);
                let reader = reader.map_err(|error| Unanswered::Kernel(chain(&error)))?;
                expected.check(|| reader.read())
            });
            if let Some(finding) = check.await?? {
                let verified = finding.verified.clone();
                self.enforcer.ask(move |enforcer| enforcer.verified(finding)).await?;
                return Ok(verified);
            }
        }
        Err(Unanswered::Changing)
    }

    fn context(&self) -> Context {
        let connection = self.controller.connection.borrow();
        Context {
            network: self.identity.network.to_string(),
            node: self.identity.name.to_string(),
            interface: self.settings.interface.to_string(),
            listen_port: self.settings.listen_port,
            received_revision: self.controller.received.borrow().as_ref().map_or(0, |slice| slice.revision.0),
            controller: view::Controller {
                connected: connection.channel.is_some(),
                endpoints: connection.endpoints.clone(),
                since: connection.since,
                error: connection.error.clone(),
            },
            certificate_expires_at: connection.certificate_expires_at,
        }
    }

    async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&mut enforce::Enforcer, &Context) -> Result<T, Unanswered> + Send + 'static,
    ) -> Result<T, Unanswered> {
        let context = self.context();
        self.enforcer.look(move |enforcer| question(enforcer, &context)).await?
    }

    /// Runs long work beside the enforcer's thread: so much at a time, also where whoever asked for it has gone.
    async fn beside<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Unanswered> {
        let broken_off = |error: &dyn std::error::Error| Unanswered::BrokenOff(error.to_string());
        let permit = Arc::clone(&self.beside).acquire_owned().await.map_err(|error| broken_off(&error))?;
        let work = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work()
        });
        work.await.map_err(|error| broken_off(&error))
    }

    async fn explain_once(&self, flow: Question) -> Result<Explanation, Unanswered> {
        let (mut explanation, slice) = self
            .ask(move |enforcer, _| {
                let explanation = explanation::explain(enforcer, flow)?;
                let slice = enforcer.intent.as_ref().map(|intent| Arc::clone(&intent.slice));
                Ok((explanation, slice))
            })
            .await?;
        explanation.interpreted = self.interpret(flow, slice.as_deref()).await;
        explanation.agree = explanation::agree(&explanation);
        Ok(explanation)
    }

    async fn interpret(&self, flow: Question, slice: Option<&Slice>) -> Interpreted {
        let unavailable = |reason: &str| Interpreted { unavailable: Some(reason.to_owned()), ..Interpreted::default() };
        let Some(channel) = self.controller.connection.borrow().channel.clone() else {
            return unavailable("the controller is not connected");
        };
        let bytes = |address| match address {
            std::net::IpAddr::V4(v4) => v4.octets().to_vec(),
            std::net::IpAddr::V6(v6) => v6.octets().to_vec(),
        };
        let mut request = tonic::Request::new(v1::ExplainRequest {
            source: bytes(flow.source),
            destination: bytes(flow.destination),
            protocol: flow.protocol.into(),
            port: flow.port.into(),
        });
        request.set_timeout(INTERPRETER);
        let v1::ExplainResponse { revision, verdict, source_cidr: _, destination_cidr: _, rule } =
            match follow::sync_client(channel).explain(request).await {
                Ok(response) => response.into_inner(),
                Err(status) => return unavailable(&format!("the controller did not answer: {}", status.message())),
            };
        let Some(Ok(verdict)) = verdict.map(Verdict::try_from) else {
            return unavailable("the controller's answer makes no sense");
        };
        let named = || slice.and_then(|slice| slice.rules.get(&verdict.rule?)).map(|rule| rule.name.to_string());
        let rule = if rule.is_empty() { named() } else { Some(rule) };
        Interpreted { answer: Some(explanation::answer(&verdict, rule)), revision: Some(revision), unavailable: None }
    }
}

impl Answerer for Agent {
    async fn status(&self) -> Result<view::Status, Unanswered> {
        self.ask(view::status::status).await
    }

    async fn peers(&self) -> Result<Vec<view::Peer>, Unanswered> {
        self.ask(|enforcer, _| view::status::peers(enforcer)).await
    }

    async fn show_policy(&self) -> Result<view::Policy, Unanswered> {
        self.ask(view::policy::policy).await
    }

    async fn verify_policy(&self) -> Result<Verified, Unanswered> {
        self.verify().await
    }

    /// Asks everybody. Where they differ a change may be on its way to this node: then once more.
    async fn explain(&self, flow: Question) -> Result<Explanation, Unanswered> {
        for _ in 0..EXPLAIN_AGAIN {
            let explanation = self.explain_once(flow).await?;
            if explanation.agree {
                return Ok(explanation);
            }
            tokio::time::sleep(ON_ITS_WAY).await;
        }
        self.explain_once(flow).await
    }

    async fn list_flows(&self, filter: FlowFilter) -> Result<Flows, Unanswered> {
        let snapshot = self.ask(|enforcer, _| view::flows::snapshot(enforcer)).await?;
        self.beside(move || view::flows::flows(snapshot, filter)).await
    }

    fn list_drops(&self, filter: &DropFilter) -> Drops {
        self.drops.recent(filter)
    }

    fn follow_drops(&self, filter: DropFilter) -> Records {
        self.drops.follow(filter)
    }
}
