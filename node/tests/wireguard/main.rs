//! Userspace WireGuard between real network namespaces:
//!
//! ```text
//!   namespace 1                                          namespace 2
//!   rampart0  10.42.0.1  fd42::1                         rampart0  10.42.0.2  fd42::2
//!   noded wireguard                                      noded wireguard
//!   underlay  192.0.2.1  2001:db8::1  ----- veth -----   underlay  192.0.2.2  2001:db8::2
//! ```

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::CloneFlags;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use node::kernel::Backend;
use node::kernel::wireguard::{Options, Preference, detect};
use tempfile::TempDir;

use self::end::{Echo, End, INTERFACE, options, wait_until};
use self::namespace::Namespace;

mod either;
mod end;
mod namespace;

/// Says to a copy of this test program which directory of sockets to serve, and nothing more.
const AGENT: &str = "RAMPART_TEST_AGENT";

#[test]
fn killing_the_agent_leaves_the_tunnel() {
    let (first, second) = End::pair();
    let process = Pid::from_raw(first.process());
    kill(process, Signal::SIGKILL).unwrap();
    wait_until("nobody serves the first end", || first.observe().unwrap().is_none());
    // Another agent, in a process of its own, starts WireGuard again, and is killed.
    let directory = first.socket().parent().unwrap().to_owned();
    let mut agent = first.namespace.run(move || {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "agent_that_is_killed", "--nocapture"])
            .env(AGENT, directory)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    });
    let mut lines = BufReader::new(agent.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("serving")), "the agent serves");
    first.configure();
    let peer = second.as_peer();
    first.wireguard(move |wireguard| wireguard.set_peer(&peer)).unwrap();
    let mut echo = Echo::new(&first, "10.42.0.1", &second, "10.42.0.2");
    echo.until_through();
    let served_by = first.process();
    agent.kill().unwrap();
    agent.wait().unwrap();
    (0..100).for_each(|_| echo.once());
    assert_eq!(first.process(), served_by);
    // And the next agent takes it over as it is.
    first.wireguard(|wireguard| wireguard.create().and_then(|()| wireguard.serve())).unwrap();
    assert_eq!(first.process(), served_by);
    echo.once();
}

/// Not a test but the other process of the one above, and without its variable nothing.
#[test]
fn agent_that_is_killed() {
    let Some(directory) = std::env::var_os(AGENT) else { return };
    let mut wireguard = detect(INTERFACE, Preference::Auto, options(directory.into())).unwrap();
    assert_eq!(wireguard.backend(), Backend::Userspace, "the interface is there and keeps its kind");
    wireguard.create().and_then(|()| wireguard.serve()).unwrap();
    println!("serving");
    loop {
        std::thread::park();
    }
}

#[test]
fn dead_process_is_replaced_under_the_same_link() {
    let (first, second) = End::pair();
    let mut echo = Echo::new(&first, "10.42.0.1", &second, "10.42.0.2");
    echo.until_through();
    let link = first.namespace.ip("-o link show rampart0");
    kill(Pid::from_raw(first.process()), Signal::SIGKILL).unwrap();
    wait_until("nobody serves", || first.observe().unwrap().is_none());
    let peer = second.as_peer();
    let error = first.wireguard(move |wireguard| wireguard.set_peer(&peer)).unwrap_err().to_string();
    assert!(error.contains("no process serves it"), "{error}");
    first.wireguard(|wireguard| wireguard.serve()).unwrap();
    let device = first.observe().unwrap().unwrap();
    assert_eq!((device.public_key, device.peers.len()), (None, 0));
    let index = |link: &str| link.split(':').next().unwrap().to_owned();
    assert_eq!(index(&first.namespace.ip("-o link show rampart0")), index(&link));
    first.configure();
    let peer = second.as_peer();
    first.wireguard(move |wireguard| wireguard.set_peer(&peer)).unwrap();
    echo.until_through();
}

#[test]
fn process_goes_with_its_socket_and_with_its_link() {
    let end = End::new(1);
    let alive =
        |process: i32| fs::read_to_string(format!("/proc/{process}/stat")).is_ok_and(|stat| !stat.contains(") Z "));
    let serve = || end.wireguard(|wireguard| wireguard.create().and_then(|()| wireguard.serve()));
    serve().unwrap();
    let process = end.process();
    fs::remove_file(end.socket()).unwrap();
    assert_eq!(end.observe().unwrap(), None);
    wait_until("the process follows its socket", || !alive(process));
    serve().unwrap();
    let process = end.process();
    end.namespace.ip("link delete rampart0");
    wait_until("the process follows its link", || !alive(process));
    assert!(!end.socket().exists());
    assert_eq!(end.observe().unwrap(), None);
}

#[test]
fn link_that_is_down_for_a_while_is_no_end() {
    let (first, second) = End::pair();
    let mut echo = Echo::new(&second, "10.42.0.2", &first, "10.42.0.1");
    echo.until_through();
    let process = first.process();
    first.namespace.ip("link set rampart0 down");
    assert!((0..5).all(|_| !echo.try_once(Duration::from_millis(50))));
    first.namespace.ip("link set rampart0 up");
    first.namespace.ip("route replace 10.42.0.0/16 dev rampart0");
    echo.until_through();
    assert_eq!(first.process(), process);
}

#[test]
fn destroy_leaves_nothing() {
    let (first, _second) = End::pair();
    let process = first.process();
    first.wireguard(|wireguard| wireguard.destroy()).unwrap();
    assert!(!fs::exists(format!("/proc/{process}")).unwrap());
    assert!(!first.socket().exists());
    assert!(!first.namespace.ip("-o link show").contains(INTERFACE));
    // Again, and when the process does not listen to SIGTERM.
    first.wireguard(|wireguard| wireguard.destroy()).unwrap();
    first.wireguard(|wireguard| wireguard.create().and_then(|()| wireguard.serve())).unwrap();
    let process = first.process();
    kill(Pid::from_raw(process), Signal::SIGSTOP).unwrap();
    first.wireguard(|wireguard| wireguard.destroy()).unwrap();
    assert!(!fs::exists(format!("/proc/{process}")).unwrap());
}

#[test]
fn foreign_socket_is_refused_and_left() {
    let (first, second) = (End::new(1), End::new(2));
    for end in [&first, &second] {
        end.wireguard(|wireguard| wireguard.create()).unwrap();
    }
    second.wireguard(|wireguard| wireguard.serve()).unwrap();
    let process = second.process();
    // The first end's path leads to the second's process, as where two namespaces share the directory.
    std::os::unix::fs::symlink(second.socket(), first.socket()).unwrap();
    let error = first.wireguard(|wireguard| wireguard.serve()).unwrap_err().to_string();
    assert!(error.contains(&format!("served by process {process}")), "{error}");
    first.observe().unwrap_err();
    first.wireguard(|wireguard| wireguard.destroy()).unwrap_err();
    assert!(second.observe().unwrap().is_some());
    // Somebody in our namespace who is not ours.
    fs::remove_file(first.socket()).unwrap();
    let _listener = UnixListener::bind(first.socket()).unwrap();
    first.observe().unwrap_err();
    fs::remove_file(first.socket()).unwrap();
}

#[test]
fn socket_is_for_root_alone() {
    let end = End::new(1);
    end.wireguard(|wireguard| wireguard.create().and_then(|()| wireguard.serve())).unwrap();
    assert_eq!(fs::metadata(end.socket()).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn socket_that_nobody_serves_is_replaced() {
    let end = End::new(1);
    drop(UnixListener::bind(end.socket()).unwrap());
    end.wireguard(|wireguard| wireguard.create().and_then(|()| wireguard.serve())).unwrap();
    assert!(end.observe().unwrap().is_some());
}

#[test]
fn machine_without_tun_is_told_what_to_do() {
    let namespace = Namespace::new();
    let error = namespace.run(|| {
        let none = None::<&str>;
        nix::sched::unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        mount(none, "/dev/net", Some("tmpfs"), MsFlags::empty(), none).unwrap();
        detect(INTERFACE, Preference::Userspace, Options::default()).map(|_| ()).unwrap_err().to_string()
    });
    assert!(error.contains("`/dev/net/tun`") && error.contains("mknod /dev/net/tun c 10 200"), "{error}");
}

#[test]
fn process_that_cannot_start_says_why() {
    let end = End::new(1);
    end.wireguard(|wireguard| wireguard.create()).unwrap();
    // Somebody else has the device open.
    let _holder = end.namespace.run(|| Holder::new(INTERFACE));
    let error = end.wireguard(|wireguard| wireguard.serve()).unwrap_err();
    assert!(error.to_string().contains("did not start (exit status: 1)"), "{error}");
    let reason = error.source.expect("the process said why").to_string();
    assert!(reason.contains("another process has it"), "{reason}");
}

/// A process that has the TUN device open: `ip` cannot, so it is a second `noded wireguard` on another socket.
struct Holder {
    process: Child,
    _directory: TempDir,
}

impl Holder {
    fn new(interface: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("sock");
        let mut command = Command::new(env!("CARGO_BIN_EXE_noded"));
        let command = command.args(["wireguard", "--interface", interface, "--socket"]).arg(&socket);
        let process = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        wait_until("the holder serves", || socket.exists());
        Self { process, _directory: directory }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn choice_is_the_kernels_wireguard_where_there_is_one() {
    let namespace = Namespace::new();
    let directory = tempfile::tempdir().unwrap();
    let options = options(directory.path().to_owned());
    let before = namespace.ip("-o link");
    let (auto, kernel) = namespace.run(move || {
        let auto = detect(INTERFACE, Preference::Auto, options.clone()).unwrap().backend();
        (auto, detect(INTERFACE, Preference::Kernel, options).map(|wireguard| wireguard.backend()))
    });
    match auto {
        Backend::Kernel => assert_eq!(kernel.unwrap(), Backend::Kernel),
        Backend::Userspace => {
            let error = kernel.unwrap_err().to_string();
            assert!(error.contains("modprobe wireguard"), "{error}");
        }
    }
    assert_eq!(namespace.ip("-o link"), before, "choosing leaves nothing");
}

/// With userspace WireGuard, on every kernel.
mod userspace {
    use node::kernel::wireguard::Preference;

    use crate::either;

    #[test]
    fn traffic_passes_and_is_counted() {
        either::traffic_passes_and_is_counted(Preference::Userspace);
    }

    #[test]
    fn edits_lose_no_packet() {
        either::edits_lose_no_packet(Preference::Userspace);
    }

    #[test]
    fn peer_that_lost_its_prefixes_or_itself_is_cut_off() {
        either::peer_that_lost_its_prefixes_or_itself_is_cut_off(Preference::Userspace);
    }

    #[test]
    fn port_that_is_taken_is_said_and_the_old_one_stays() {
        either::port_that_is_taken_is_said_and_the_old_one_stays(Preference::Userspace);
    }

    #[test]
    fn foreign_link_is_refused_and_left() {
        either::foreign_link_is_refused_and_left(Preference::Userspace);
    }

    #[test]
    fn many_prefixes_are_set_and_read_back() {
        either::many_prefixes_are_set_and_read_back(Preference::Userspace);
    }
}

/// With the kernel's WireGuard: `cargo xtask vm 6.1 -- PATH-OF-THIS-PROGRAM --ignored`, where this kernel has none.
mod kernel {
    use node::kernel::Backend;
    use node::kernel::wireguard::{Preference, detect};

    use crate::either;
    use crate::end::{End, INTERFACE, options};

    #[test]
    #[ignore = "needs a kernel with WireGuard"]
    fn traffic_passes_and_is_counted() {
        either::traffic_passes_and_is_counted(Preference::Kernel);
    }

    #[test]
    #[ignore = "needs a kernel with WireGuard"]
    fn edits_lose_no_packet() {
        either::edits_lose_no_packet(Preference::Kernel);
    }

    #[test]
    #[ignore = "needs a kernel with WireGuard"]
    fn peer_that_lost_its_prefixes_or_itself_is_cut_off() {
        either::peer_that_lost_its_prefixes_or_itself_is_cut_off(Preference::Kernel);
    }

    #[test]
    #[ignore = "needs a kernel with WireGuard"]
    fn port_that_is_taken_is_said_and_the_old_one_stays() {
        either::port_that_is_taken_is_said_and_the_old_one_stays(Preference::Kernel);
    }

    #[test]
    #[ignore = "needs a kernel with WireGuard"]
    fn foreign_link_is_refused_and_left() {
        either::foreign_link_is_refused_and_left(Preference::Kernel);
    }

    #[test]
    #[ignore = "needs a kernel with WireGuard"]
    fn many_prefixes_are_set_and_read_back() {
        either::many_prefixes_are_set_and_read_back(Preference::Kernel);
    }

    #[test]
    #[ignore = "needs a kernel with WireGuard"]
    fn half_made_link_is_finished_and_a_used_one_is_foreign() {
        let end = End::with(1, Preference::Kernel);
        end.namespace.ip("link add rampart0 type wireguard");
        end.namespace.ip("link set rampart0 up");
        let error = end.wireguard(|wireguard| wireguard.create()).unwrap_err().to_string();
        assert!(error.contains("of kind `wireguard`, and not Rampart's"), "{error}");
        assert_eq!(end.observe().unwrap(), None);
        // As an agent leaves it that was killed between making and marking it.
        end.namespace.ip("link set rampart0 down");
        end.wireguard(|wireguard| wireguard.create()).unwrap();
        assert!(end.observe().unwrap().is_some());
        assert!(end.namespace.ip("link show rampart0").contains(node::kernel::link::OWNER));
    }

    #[test]
    #[ignore = "needs a kernel with WireGuard"]
    fn kernel_is_the_first_choice_and_a_link_keeps_its_kind() {
        let end = End::with(1, Preference::Auto);
        assert_eq!(end.wireguard(|wireguard| wireguard.backend()), Backend::Kernel);
        let userspace = End::new(2);
        userspace.wireguard(|wireguard| wireguard.create()).unwrap();
        let directory = userspace.socket().parent().unwrap().to_owned();
        let backend = userspace.namespace.run(move || {
            let choose = |preference| detect(INTERFACE, preference, options(directory.clone())).unwrap();
            let error = choose(Preference::Kernel).create().unwrap_err().to_string();
            assert!(error.contains("made for the other WireGuard backend"), "{error}");
            choose(Preference::Auto).backend()
        });
        assert_eq!(backend, Backend::Userspace);
    }
}
