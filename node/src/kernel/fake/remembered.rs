//! A device with many peers, for measurements.

use policy::PublicKey;

use super::FakeWireGuard;
use crate::kernel::{Backend, Device, DevicePeer, KernelError, PeerConfig, WireGuard};
use crate::key::PrivateKey;

/// WireGuard in memory, in which a peer costs what it does in the kernel: nothing that grows with the others.
#[derive(Debug)]
pub struct RememberedWireGuard {
    inner: FakeWireGuard,
    device: Option<Device>,
}

impl RememberedWireGuard {
    /// On the link of a fake kernel.
    pub fn new(inner: FakeWireGuard) -> Self {
        Self { inner, device: None }
    }

    fn device(&mut self) -> Result<&mut Device, KernelError> {
        self.device.as_mut().ok_or_else(|| KernelError::new("nothing serves the link"))
    }
}

impl WireGuard for RememberedWireGuard {
    fn backend(&self) -> Backend {
        self.inner.backend()
    }

    fn create(&mut self) -> Result<(), KernelError> {
        self.inner.create()
    }

    fn serve(&mut self) -> Result<(), KernelError> {
        self.device.get_or_insert_default();
        Ok(())
    }

    fn observe(&mut self) -> Result<Option<Device>, KernelError> {
        Ok(self.device.clone())
    }

    fn set_device(&mut self, key: &PrivateKey, listen_port: u16) -> Result<(), KernelError> {
        let device = self.device()?;
        (device.public_key, device.listen_port) = (Some(key.public()), listen_port);
        Ok(())
    }

    fn set_peer(&mut self, peer: &PeerConfig) -> Result<(), KernelError> {
        let peers = &mut self.device()?.peers;
        let endpoint = peer.endpoint.or_else(|| peers.get(&peer.public_key).and_then(|known| known.endpoint));
        let fresh = DevicePeer {
            endpoint,
            allowed_ips: peer.allowed_ips.clone(),
            persistent_keepalive: peer.persistent_keepalive,
            last_handshake: None,
            received_bytes: 0,
            sent_bytes: 0,
        };
        peers.insert(peer.public_key, fresh);
        Ok(())
    }

    fn remove_peer(&mut self, peer: &PublicKey) -> Result<(), KernelError> {
        self.device()?.peers.remove(peer);
        Ok(())
    }

    fn destroy(&mut self) -> Result<(), KernelError> {
        self.device = None;
        self.inner.destroy()
    }
}
