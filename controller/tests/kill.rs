//! A controller that is killed at any moment has every change that it acknowledged; one that is asked to stop leaves
//! nothing behind.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use controller_api::client;
use controller_api::v1;
use controller_api::v1::admin_client::AdminClient;
use tonic::transport::Channel;

const LIMIT: Duration = Duration::from_secs(20);
const ROUNDS: usize = 8;

struct Daemon(Child);

impl Daemon {
    fn start(directory: &Path) -> Self {
        let child = Command::new(env!("CARGO_BIN_EXE_controllerd"))
            .args(["serve", "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"])
            .arg("--state-dir")
            .arg(directory.join("state"))
            .arg("--socket")
            .arg(directory.join("controller.sock"))
            .env("RUST_LOG", "warn")
            .spawn();
        Self(child.expect("controllerd starts"))
    }

    /// SIGKILL.
    fn kill(mut self) {
        self.0.kill().expect("killed");
        self.0.wait().expect("gone");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn connect(directory: &Path) -> AdminClient<Channel> {
    let start = Instant::now();
    loop {
        match client::connect_unix(directory.join("controller.sock")).await {
            Ok(channel) => return AdminClient::new(channel),
            Err(error) if start.elapsed() > LIMIT => panic!("{error}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    }
}

fn add_group(number: u64) -> v1::ChangeRequest {
    let group = v1::AddGroup { name: format!("g{number}"), members: Vec::new() };
    let change = v1::Change { kind: Some(v1::change::Kind::AddGroup(group)) };
    v1::ChangeRequest { request_id: format!("add-{number}"), changes: vec![change], ..Default::default() }
}

async fn groups(admin: &mut AdminClient<Channel>) -> BTreeSet<String> {
    let network = admin.get_network(v1::GetNetworkRequest::default()).await.expect("a network").into_inner().network;
    network.expect("one").groups.into_iter().map(|group| group.name).collect()
}

/// Different from round to round and run to run; the number is printed, so that a failure tells how long it was.
fn random_milliseconds() -> u64 {
    let mut bytes = [0; 2];
    getrandom::fill(&mut bytes).expect("random bytes");
    20 + u64::from(u16::from_ne_bytes(bytes)) % 200
}

fn init(directory: &Path) {
    let init = Command::new(env!("CARGO_BIN_EXE_controllerd"))
        .args(["init", "--network", "corp", "--root", "10.42.0.0/16", "--endpoint", "127.0.0.1:7443", "--state-dir"])
        .arg(directory.join("state"))
        .stderr(Stdio::null())
        .status();
    assert!(init.expect("controllerd starts").success());
}

#[tokio::test]
async fn sigterm_ends_it_cleanly() {
    let directory = tempfile::tempdir().expect("a directory");
    let directory = directory.path();
    init(directory);
    let mut daemon = Daemon::start(directory);
    // A connection that stays open, of a client that does not answer while this thread waits.
    let mut admin = connect(directory).await;
    admin.change(add_group(1)).await.expect("changed");
    let second = Command::new(env!("CARGO_BIN_EXE_controllerd"))
        .args(["serve", "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--state-dir"])
        .arg(directory.join("state"))
        .output()
        .expect("controllerd starts");
    let said = String::from_utf8_lossy(&second.stderr);
    assert_eq!(second.status.code(), Some(1), "{said}");
    assert!(said.contains(&format!("`{}`", daemon.0.id())) && said.contains("in use"), "{said}");

    let pid = nix::unistd::Pid::from_raw(i32::try_from(daemon.0.id()).expect("a pid"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("signalled");
    assert_eq!(daemon.0.wait().expect("gone").code(), Some(0));
    assert!(!directory.join("controller.sock").exists());
    let left: BTreeSet<_> = std::fs::read_dir(directory.join("state"))
        .expect("a directory")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"))
        .collect();
    let expected = ["authority.crt", "authority.key", "controller.db", "controller.lock"];
    assert_eq!(left, expected.map(str::to_owned).into());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_acknowledged_change_is_lost() {
    let directory = tempfile::tempdir().expect("a directory");
    let directory = directory.path();
    init(directory);
    let (mut acknowledged, mut next) = (BTreeSet::new(), 0);
    for round in 0..ROUNDS {
        let daemon = Daemon::start(directory);
        let mut admin = connect(directory).await;
        let found = groups(&mut admin).await;
        assert!(acknowledged.is_subset(&found), "lost: {:?}", acknowledged.difference(&found).collect::<Vec<_>>());
        // The one whose answer was never heard is asked for again, and done once.
        if next > 0 {
            admin.change(add_group(next - 1)).await.expect("done, before or now");
            acknowledged.insert(format!("g{}", next - 1));
        }
        let pause = random_milliseconds();
        let killer = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(pause)).await;
            daemon.kill();
        });
        loop {
            let number = next;
            next += 1;
            match admin.change(add_group(number)).await {
                Ok(_) => acknowledged.insert(format!("g{number}")),
                Err(_) => break,
            };
        }
        killer.await.expect("killed");
        eprintln!("round {round}: killed after {pause} ms, {} changes acknowledged", acknowledged.len());
    }
    let _daemon = Daemon::start(directory);
    let found = groups(&mut connect(directory).await).await;
    assert!(acknowledged.is_subset(&found));
    assert!(found.len() <= acknowledged.len() + 1, "a change nobody asked for");
    assert!(acknowledged.len() > 2 * ROUNDS, "the stream of changes was no stream");
}
