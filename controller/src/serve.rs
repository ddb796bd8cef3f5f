//! `controllerd serve`: puts the parts together, and takes them apart in order.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use controller_api::defaults::{CONTROLLER_CERTIFICATE_LIFETIME, renew_after};
use controller_api::tls;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};

use crate::access::authority::Authority;
use crate::access::questions::Questions;
use crate::change::writer;
use crate::clock;
use crate::config::Config;
use crate::follow::dispatcher;
use crate::grpc::{self, Context};
use crate::init::DATABASE;
use crate::metrics::{self, Metrics};
use crate::socket::admission;
use crate::socket::tls::{self as tls_socket, Tls};
use crate::socket::unix::{self, PrivateSocket};
use crate::state::history::History;
use crate::state::{self, State};
use crate::store::sqlite::SqliteStore;
use crate::store::{Keep, Store};

/// How often certificates and what is known of nodes are looked after.
const HOUSEKEEPING: Duration = Duration::from_secs(60);
/// How often revisions are folded that need not be kept.
const COMPACTION: Duration = Duration::from_secs(60);
/// How often the writer is looked after.
const DEATH_CHECK: Duration = Duration::from_millis(100);
/// How long open calls may take to end when the controller stops.
const GRACE: Duration = Duration::from_secs(2);

/// A controller without its listeners: what the services work with, over a store of any kind.
#[derive(Debug)]
pub struct Controller {
    pub context: Context,
    writer: std::thread::JoinHandle<()>,
}

impl Controller {
    /// Reads the store. `stop`: becomes true when calls are to be ended.
    pub async fn start(
        store: Arc<dyn Store>,
        authority: impl FnOnce(&State) -> Result<Authority>,
        clock: fn() -> u64,
        stop: watch::Receiver<bool>,
    ) -> Result<Self> {
        let metrics = Metrics::new();
        let (state, history) = History::load(&*store)?;
        let authority = Arc::new(authority(&state)?);
        metrics.revision.set(state.policy.revision.0);
        metrics.nodes.set(i64::try_from(state.network().nodes().len()).unwrap_or(i64::MAX));
        let dispatch = dispatcher::start(history, Arc::clone(&metrics)).context("failed to start the dispatcher")?;
        let (publisher, current) = state::channel(state);
        let (writer, thread) =
            writer::spawn(Arc::clone(&store), publisher, dispatch.clone(), Arc::clone(&metrics), clock)?;
        let refusals = Arc::default();
        let questions = Questions::new(Arc::clone(&metrics));
        let context =
            Context { current, writer, dispatch, store, authority, metrics, questions, clock, stop, refusals };
        Ok(Self { context, writer: thread })
    }
}

/// Runs until SIGTERM or SIGINT.
pub fn serve(config: &Config) -> Result<()> {
    raise_file_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.context("failed to start the runtime")?;
    let (ended, writer) = match runtime.block_on(run(config)) {
        Ok((ended, writer)) => (ended, Some(writer)),
        Err(error) => (Err(error), None),
    };
    // Takes the connections of clients that do not answer with it, and what they hold.
    runtime.shutdown_timeout(GRACE);
    // The writer ends with the last one who could ask it for something; the store is closed after it.
    let start = Instant::now();
    while writer.as_ref().is_some_and(|writer| !writer.is_finished()) && start.elapsed() < GRACE {
        std::thread::sleep(Duration::from_millis(5));
    }
    ended
}

/// Every connection is a file, and the soft limit is usually far below what the system would give.
fn raise_file_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map(|()| hard));
    let needed = admission::FILES as u64;
    match raised {
        Ok(limit) if limit < needed => tracing::warn!(
            limit,
            needed,
            "limit of open files is below what every connection needs; raise it (`LimitNOFILE=` of the systemd unit, or \
             `ulimit -Hn`)"
        ),
        Ok(_) => {}
        Err(error) => tracing::warn!(%error, "limit of open files could not be raised"),
    }
}

type Ended = (Result<()>, std::thread::JoinHandle<()>);

/// An error: it did not get to serve.
async fn run(config: &Config) -> Result<Ended> {
    let database = config.state_dir.join(DATABASE);
    let store: Arc<dyn Store> = Arc::new(SqliteStore::open(&database)?);
    let (stopper, stop) = watch::channel(false);
    let authority = |state: &State| {
        let (network, settings) = (state.network().name(), &state.accounts.settings);
        Ok(Authority::open(&config.state_dir, network, Some(&settings.authority))?)
    };
    let listener = listen(config.listen).await?;
    let scraped = metrics::bind(config.metrics).await.with_context(|| {
        format!("failed to serve metrics at `{}`; choose another address with `--metrics`", config.metrics)
    })?;
    let PrivateSocket { listener: socket, file: _socket_file } = unix::bind(&config.socket)?;
    let Controller { context, writer } = Controller::start(store, authority, clock::now, stop.clone()).await?;
    let tls = Tls::new(server_config(&context.authority)?);
    let incoming = vec![
        tls_socket::accept(listener, tls.clone(), context.accepts(), &context.metrics),
        unix::accept(socket, Arc::clone(&context.metrics)),
    ];
    let routes = grpc::routes(&context).await?;
    let mut servers = tokio::spawn(grpc::serve(routes, incoming, stop.clone()));
    let metrics = tokio::spawn(serve_metrics(scraped, &context, stop.clone()));
    let housekeeping = tokio::spawn(keep_house(context.clone(), tls));
    let compaction = tokio::spawn(compact(Arc::clone(&context.store), config.keep));
    tracing::info!(
        network = %context.authority.network(),
        revision = context.current.get().policy.revision.0,
        listen = %config.listen,
        socket = %config.socket.display(),
        metrics = %config.metrics,
        "serving"
    );
    notify(&[sd_notify::NotifyState::Ready]);
    let ended = until_told(&writer, &mut servers).await;
    notify(&[sd_notify::NotifyState::Stopping]);
    stopper.send_replace(true);
    if !servers.is_finished() && tokio::time::timeout(GRACE, &mut servers).await.is_err() {
        tracing::info!("some calls did not end in time");
        servers.abort();
    }
    housekeeping.abort();
    compaction.abort();
    metrics.abort();
    Ok((ended, writer))
}

type Servers = tokio::task::JoinHandle<Result<(), tonic::transport::Error>>;

/// An error: it was not a signal.
async fn until_told(writer: &std::thread::JoinHandle<()>, servers: &mut Servers) -> Result<()> {
    tokio::select! {
        signal = terminated() => signal.map(|name| tracing::info!(signal = name, "stopping")),
        () = died(writer) => {
            Err(anyhow!("writer has died, which is a bug; restart `controllerd`: nothing acknowledged is lost"))
        }
        result = servers => Err(match result {
            Ok(Ok(())) => anyhow!("listeners have ended; restart `controllerd`"),
            Ok(Err(error)) => anyhow::Error::new(error).context("listeners have failed"),
            Err(error) => anyhow::Error::new(error).context("listeners have failed"),
        }),
    }
}

/// `[::]` takes IPv4 too; where the kernel has no IPv6, `0.0.0.0` is meant.
async fn listen(address: SocketAddr) -> Result<TcpListener> {
    let bound = match TcpListener::bind(address).await {
        Err(error) if error.raw_os_error() == Some(nix::libc::EAFNOSUPPORT) && address.ip().is_unspecified() => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        bound => bound,
    };
    bound.with_context(|| format!("failed to listen at `{address}`; choose another address with `--listen`"))
}

fn server_config(authority: &Authority) -> Result<rustls::ServerConfig> {
    let identity = authority.server_identity(clock::now())?;
    Ok(tls::server_config(&identity, authority.certificate())?)
}

fn serve_metrics(
    listener: TcpListener,
    context: &Context,
    mut stop: watch::Receiver<bool>,
) -> impl Future<Output = ()> + use<> {
    let (metrics, reports) = (Arc::clone(&context.metrics), context.dispatch.reports.clone());
    let refresh = move |metrics: &Metrics| {
        let (connected, converged) = reports.count();
        metrics.connected.set(i64::try_from(connected).unwrap_or(i64::MAX));
        metrics.converged.set(i64::try_from(converged).unwrap_or(i64::MAX));
    };
    async move {
        let stopped = async move {
            let _ = stop.wait_for(|stop| *stop).await;
        };
        if let Err(error) = metrics::serve(listener, metrics, Arc::new(refresh), stopped).await {
            tracing::warn!(%error, "metrics are not served any more");
        }
    }
}

/// Renews the controller's certificate in time, and forgets nodes that are gone.
async fn keep_house(context: Context, tls: Tls) {
    let mut renew_at = clock::now() + renew_after(CONTROLLER_CERTIFICATE_LIFETIME).as_secs();
    let mut ticks = interval(HOUSEKEEPING);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let state = context.current.get();
        context.dispatch.reports.retain(state.network());
        context.dispatch.directory.retain(state.network());
        context.questions.sweep(Instant::now());
        if clock::now() < renew_at {
            continue;
        }
        match server_config(&context.authority) {
            Ok(config) => {
                tls.replace(config);
                renew_at = clock::now() + renew_after(CONTROLLER_CERTIFICATE_LIFETIME).as_secs();
                tracing::info!("the controller's certificate was renewed");
            }
            Err(error) => tracing::warn!(%error, "the controller's certificate could not be renewed"),
        }
    }
}

/// Folds what need not be kept, step by step, so that the writer never waits for long.
async fn compact(store: Arc<dyn Store>, keep: Keep) {
    let mut ticks = interval(COMPACTION);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let mut more = true;
        while more {
            let store = Arc::clone(&store);
            let step = tokio::task::spawn_blocking(move || store.compact(keep, clock::now())).await;
            more = match step {
                Ok(Ok(more)) => more,
                Ok(Err(error)) => {
                    tracing::warn!(%error, "old revisions could not be compacted");
                    false
                }
                Err(_) => return,
            };
        }
    }
}

async fn terminated() -> Result<&'static str> {
    let mut terminate = signal(SignalKind::terminate()).context("failed to wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("failed to wait for SIGINT")?;
    Ok(tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    })
}

async fn died(thread: &std::thread::JoinHandle<()>) {
    let mut ticks = interval(DEATH_CHECK);
    while !thread.is_finished() {
        ticks.tick().await;
    }
}

/// Outside systemd there is nobody to tell.
fn notify(states: &[sd_notify::NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "systemd could not be notified");
    }
}
