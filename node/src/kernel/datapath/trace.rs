//! What the programs say through aya-log when `--trace-datapath` asks for it.
#![allow(unsafe_code, reason = "tokio wants a promise about the descriptor")]

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use aya::Ebpf;
use aya_log::EbpfLogger;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::kernel::KernelError;
use crate::kernel::datapath::attach::pin;

/// The log of one instance of the program, to be written to the process's logger.
pub struct Trace {
    flush: Box<dyn FnMut() + Send>,
    /// Owned by `flush`.
    fd: RawFd,
    direction: u32,
}

impl std::fmt::Debug for Trace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trace").field("direction", &pin::name(self.direction)).finish_non_exhaustive()
    }
}

impl Trace {
    pub(crate) fn new(ebpf: &mut Ebpf, direction: u32) -> Result<Self, KernelError> {
        let mut logger = EbpfLogger::init(ebpf).map_err(|error| {
            KernelError::with(format!("failed to open the trace of the {} program", pin::name(direction)), error)
        })?;
        let fd = logger.as_raw_fd();
        Ok(Self { flush: Box::new(move || logger.flush()), fd, direction })
    }

    /// Writes what is there; never waits.
    pub fn flush(&mut self) {
        (self.flush)();
    }

    /// Writes what comes, for as long as it is polled. Must be polled by a tokio runtime with IO.
    pub async fn run(self) -> io::Result<()> {
        // SAFETY: the descriptor is the logger's, which `flush` holds open and never exchanges.
        let mut trace = unsafe { AsyncFd::register_with_interest(self, Interest::READABLE) }?;
        loop {
            let mut guard = trace.readable_mut().await?;
            guard.get_inner_mut().flush();
            guard.clear_ready();
        }
    }
}

impl AsRawFd for Trace {
    fn as_raw_fd(&self) -> RawFd {
        self.fd
    }
}
