//! `controllerd init`: a new network, whole or not at all. The files are made in a directory within the state directory;
//! the database goes to its place last, and without it there is no network.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use controller_api::tls;
use ipnet::IpNet;
use policy::{ChangeError, DefaultPolicy, Network, NetworkName, Prefixes};

use crate::access::authority::{self, Authority, AuthorityError};
use crate::change::audit::Actor;
use crate::store::account::{Accounts, Settings};
use crate::store::sqlite::SqliteStore;
use crate::store::{AuditLine, Commit, Precondition, Store, StoreError, rows};

/// Within the state directory.
pub const DATABASE: &str = "controller.db";
/// Within the state directory, while a network is made.
const WORK: &str = "init.tmp";

/// What `controllerd init` is told.
#[derive(Clone, Debug)]
pub struct Plan {
    pub network: NetworkName,
    pub roots: Prefixes,
    pub default: DefaultPolicy,
    /// As invitations carry them: "host:port".
    pub endpoints: Vec<String>,
}

/// Why there is no new network.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    #[error("`{}` holds a network already; choose another `--state-dir`, or remove it if that network is to be lost", path.display())]
    Exists { path: PathBuf },
    #[error(
        "root `{root}` holds `{range}`, which is {what} and no part of any network; choose a prefix without it, such as \
         `10.42.0.0/16` or `fd42::/48`"
    )]
    Root { root: IpNet, range: IpNet, what: &'static str },
    #[error("failed to {what} `{}`", path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Network(#[from] ChangeError),
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Makes the network in `directory`. `now`: seconds since the epoch.
pub fn init(directory: &Path, plan: &Plan, now: u64) -> Result<(), InitError> {
    let database = directory.join(DATABASE);
    if database.try_exists().map_err(io_error("look for", &database))? {
        return Err(InitError::Exists { path: directory.to_owned() });
    }
    // Refused before anything is touched.
    if let Some((root, range, what)) = plan.roots.reserved_within() {
        return Err(InitError::Root { root, range, what });
    }
    let network = Network::new(plan.network.clone(), plan.roots, plan.default)?;
    make_directory(directory)?;
    let work = directory.join(WORK);
    if work.exists() {
        fs::remove_dir_all(&work).map_err(io_error("remove the unfinished", &work))?;
    }
    let made = make(directory, &work, plan, &network, now);
    let removed = fs::remove_dir_all(&work).map_err(io_error("remove", &work));
    made.and(removed)
}

/// Makes the files in `work` and puts them into `directory`.
fn make(directory: &Path, work: &Path, plan: &Plan, network: &Network, now: u64) -> Result<(), InitError> {
    make_directory(work)?;
    let authority = Authority::create(work, &plan.network, now)?;
    let store = SqliteStore::create(&work.join(DATABASE))?;
    let settings =
        Settings { endpoints: plan.endpoints.clone(), authority: tls::fingerprint(authority.certificate()).to_vec() };
    found(&store, network, settings, now)?;
    // Closing the last connection folds the write-ahead log into the file.
    drop(store);
    for name in [authority::KEY_FILE, authority::CERTIFICATE_FILE] {
        let (from, to) = (work.join(name), directory.join(name));
        fs::rename(&from, &to).map_err(io_error("make", &to))?;
    }
    let (from, to) = (work.join(DATABASE), directory.join(DATABASE));
    File::open(&from).and_then(|file| file.sync_all()).map_err(io_error("write", &from))?;
    sync(directory)?;
    // Fails if somebody else was faster.
    fs::hard_link(&from, &to).map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => InitError::Exists { path: directory.to_owned() },
        _ => io_error("make", &to)(source),
    })?;
    sync(directory)
}

/// The first revision of an empty store.
pub fn found(store: &dyn Store, network: &Network, settings: Settings, now: u64) -> Result<(), StoreError> {
    let Settings { endpoints, .. } = &settings;
    let mut change = format!("init --network {} --default {}", network.name(), network.default());
    for root in network.roots().iter() {
        change.push_str(&format!(" --root {root}"));
    }
    for endpoint in endpoints {
        change.push_str(&format!(" --endpoint {endpoint}"));
    }
    let accounts = Accounts::new(settings);
    let commit = Commit {
        request: None,
        preconditions: vec![Precondition::At(policy::Revision(0))],
        ops: rows::of_everything(network, &accounts),
        audit: vec![AuditLine { actor: Actor::Root.to_string(), change }],
        time: now,
    };
    store.commit(&commit).map(|_| ())
}

/// For its owner only, if it has to be made.
fn make_directory(path: &Path) -> Result<(), InitError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io_error("make the directory", path))
}

fn sync(directory: &Path) -> Result<(), InitError> {
    File::open(directory).and_then(|file| file.sync_all()).map_err(io_error("write", directory))
}

fn io_error(what: &'static str, path: &Path) -> impl Fn(io::Error) -> InitError + use<> {
    let path = path.to_owned();
    move |source| InitError::Io { what, path: path.clone(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::State;
    use std::os::unix::fs::PermissionsExt as _;

    fn plan() -> Plan {
        Plan {
            network: "corp".parse().expect("a name"),
            roots: Prefixes::from_nets(["10.42.0.0/16".parse().expect("a prefix")]).expect("roots"),
            default: DefaultPolicy::Deny,
            endpoints: vec!["controller.example:7443".to_owned()],
        }
    }

    #[test]
    fn a_network_is_made_once() {
        let parent = tempfile::tempdir().expect("a directory");
        let directory = parent.path().join("state/controller");
        init(&directory, &plan(), 1_700_000_000).expect("a network");
        assert_eq!(fs::metadata(&directory).expect("there").permissions().mode() & 0o777, 0o700);
        let key = directory.join(authority::KEY_FILE);
        let before = fs::read(&key).expect("a key");
        assert!(matches!(init(&directory, &plan(), 1_700_000_000), Err(InitError::Exists { .. })));
        assert_eq!(fs::read(&key).expect("a key"), before);

        let store = SqliteStore::open(&directory.join(DATABASE)).expect("the store");
        let state = State::load(&store).expect("a state");
        assert_eq!(state.network().default(), DefaultPolicy::Deny);
        let settings = &state.accounts.settings;
        assert_eq!(settings.endpoints, ["controller.example:7443"]);
        Authority::open(&directory, state.network().name(), Some(&settings.authority)).expect("the authority");
        let names: Vec<_> = fs::read_dir(&directory)
            .expect("a directory")
            .map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"))
            .collect();
        assert!(
            names.iter().all(|name| name.starts_with("authority.") || name.starts_with("controller.")),
            "{names:?}"
        );
    }

    #[test]
    fn a_root_that_holds_what_no_network_can_use_is_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        for (root, range) in [
            ("0.0.0.0/0", "0.0.0.0/32"),
            ("::/0", "::/128"),
            ("126.0.0.0/7", "127.0.0.0/8"),
            ("128.0.0.0/1", "169.254.0.0/16"),
            ("fc00::/6", "fe80::/10"),
        ] {
            let roots = Prefixes::from_nets([root.parse().expect("a prefix")]).expect("roots");
            let refused = init(directory.path(), &Plan { roots, ..plan() }, 1_700_000_000).expect_err(root).to_string();
            assert!(refused.contains(&format!("`{root}` holds `{range}`")), "{refused}");
        }
        assert!(fs::read_dir(directory.path()).expect("a directory").next().is_none(), "something was made");
    }

    #[test]
    fn an_interrupted_one_is_begun_anew() {
        let directory = tempfile::tempdir().expect("a directory");
        fs::create_dir(directory.path().join(WORK)).expect("made");
        fs::write(directory.path().join(WORK).join(DATABASE), "half").expect("written");
        fs::write(directory.path().join(authority::KEY_FILE), "old").expect("written");
        init(directory.path(), &plan(), 1_700_000_000).expect("a network");
        Authority::open(directory.path(), &plan().network, None).expect("the authority");
    }
}
