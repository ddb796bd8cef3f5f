//! Builds the eBPF programs from source and leaves the objects at `$OUT_DIR/rampart` and `$OUT_DIR/guard`, for `noded` to
//! embed, and `$OUT_DIR/bench`.
//!
//! That takes a compiler with the sources of `core` beside it, which the tool chain that builds everything else need not
//! have: Debian's `rustc-web` with `rust-web-src`, or a rustup nightly with `rust-src`; and `bpf-linker`.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

/// A compiler that can build `core` for the kernel, and the cargo that goes with it.
struct ToolChain {
    rustc: PathBuf,
    cargo: PathBuf,
    /// As `rustc -vV` says it; `bpf-linker` must be built on this major version or a later one.
    llvm: String,
}

/// What nodes load, and what measures it.
const OBJECTS: [&str; 3] = ["rampart", "guard", "bench"];

/// Not loaded by nodes.
const BENCH: &str = "bench";

pub(crate) fn build() -> Result<(), String> {
    for path in ["../ebpf", "../Cargo.toml", "../Cargo.lock", "build.rs", "build"] {
        println!("cargo::rerun-if-changed={path}");
    }
    println!("cargo::rerun-if-env-changed=CARGO_HOME");
    let tool_chain = find_tool_chain().ok_or_else(|| {
        missing("a Rust compiler with its sources (Debian's `rustc-web` and `rust-web-src`, or a rustup nightly with `rust-src`)")
    })?;
    let linker = find_linker().ok_or_else(|| missing(&format!("`bpf-linker` for LLVM {}", tool_chain.llvm)))?;

    let out_dir = PathBuf::from(variable("OUT_DIR"));
    // One folder for every profile and for clippy, so that `core` is built once. It is not the outer one, which this
    // build has locked.
    let target_dir =
        out_dir.ancestors().find(|path| path.join("CACHEDIR.TAG").exists()).unwrap_or(&out_dir).join("ebpf");
    let target = match variable("CARGO_CFG_TARGET_ENDIAN").as_str() {
        "big" => "bpfeb-unknown-none",
        _ => "bpfel-unknown-none",
    };
    let flags = [
        "-Cdebuginfo=2".to_owned(),
        "-Clink-arg=--btf".to_owned(),
        // Else even three zero bytes are a call of `memset`, which walks byte by byte.
        "-Clink-arg=--disable-expand-memcpy-in-order".to_owned(),
        // Instructions that every kernel from 5.12 on knows; `v4` would need 6.6.
        "-Ctarget-cpu=v3".to_owned(),
        format!("--cfg=bpf_target_arch=\"{}\"", variable("CARGO_CFG_TARGET_ARCH")),
        format!("-Clinker={}", linker.display()),
    ];

    let mut command = Command::new(&tool_chain.cargo);
    for (name, _) in env::vars_os().filter(|(name, _)| is_outer(name)) {
        command.env_remove(name);
    }
    let output = command
        .args(["build", "--release", "--package", "ebpf", "--bins"])
        .args(["--target", target, "-Zbuild-std=core", "--target-dir"])
        .arg(&target_dir)
        .env("RUSTC", &tool_chain.rustc)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
        .output()
        .map_err(|error| format!("failed to run `{}`: {error}", tool_chain.cargo.display()))?;
    if !output.status.success() {
        eprintln!("{}", String::from_utf8_lossy(&output.stderr));
        println!(
            "cargo::error=failed to build the eBPF programs with `{}` (LLVM {}) and `{}`; what they said is below",
            tool_chain.rustc.display(),
            tool_chain.llvm,
            linker.display()
        );
        exit(1);
    }
    for name in OBJECTS {
        let object = target_dir.join(target).join("release").join(name);
        fs::copy(&object, out_dir.join(name))
            .map_err(|error| format!("failed to copy `{}`: {error}", object.display()))?;
    }
    let loaded = OBJECTS.iter().filter(|name| **name != BENCH);
    let list: String = loaded
        .map(|name| format!("({name:?}, aya::include_bytes_aligned!(concat!(env!(\"OUT_DIR\"), \"/{name}\"))),"))
        .collect();
    let path = out_dir.join("objects.rs");
    fs::write(&path, format!("&[{list}]")).map_err(|error| format!("failed to write `{}`: {error}", path.display()))
}

fn missing(what: &str) -> String {
    format!("building the eBPF programs needs {what}; run `cargo xtask setup`")
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("cargo sets `{name}` for build scripts"))
}

/// What this build says about itself and would say about the inner one too, wrongly: `RUSTFLAGS`, `TARGET`, clippy as the
/// compiler, the job server. Where crates come from is the same for both.
fn is_outer(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    match name.as_ref() {
        "CARGO_HOME" | "RUSTUP_HOME" | "RUSTUP_TOOLCHAIN" => false,
        "TARGET" | "HOST" | "PROFILE" | "OPT_LEVEL" | "DEBUG" | "NUM_JOBS" | "OUT_DIR" | "MAKEFLAGS" => true,
        name if ["CARGO_NET_", "CARGO_HTTP_", "CARGO_REGISTR", "CARGO_SOURCE_"]
            .iter()
            .any(|kept| name.starts_with(kept)) =>
        {
            false
        }
        name => name.starts_with("CARGO") || name.starts_with("RUST"),
    }
}

/// The first of: the compiler of this build, Debian's, rustup's nightly.
fn find_tool_chain() -> Option<ToolChain> {
    let cargo = PathBuf::from(variable("CARGO"));
    let own = PathBuf::from(variable("RUSTC"));
    let debian = PathBuf::from("/usr/bin/rustc");
    [own, debian].into_iter().find_map(|rustc| ToolChain::probe(rustc, &cargo)).or_else(|| {
        let which = run("rustup", &["which", "--toolchain", "nightly", "rustc"])?;
        let rustc = PathBuf::from(which.trim());
        // A nightly's sources may need its own cargo to read them.
        let cargo = rustc.with_file_name("cargo");
        ToolChain::probe(rustc, &cargo)
    })
}

impl ToolChain {
    /// `None`: it does not run, or its sources are not there.
    fn probe(rustc: PathBuf, cargo: &Path) -> Option<Self> {
        let sysroot = run(&rustc, &["--print", "sysroot"])?;
        let sources = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/Cargo.toml");
        let version = run(&rustc, &["-vV"])?;
        let llvm = version.lines().find_map(|line| line.strip_prefix("LLVM version: "))?.to_owned();
        sources.exists().then(|| Self { rustc, cargo: cargo.to_owned(), llvm })
    }
}

fn find_linker() -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo")))
        .map(|home| home.join("bin"));
    env::split_paths(&path).chain(home).map(|folder| folder.join("bpf-linker")).find(|file| file.is_file())
}

fn run(program: impl AsRef<OsStr>, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).env("RUSTUP_AUTO_INSTALL", "0").output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}
