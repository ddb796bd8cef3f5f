//! Leaving a network: the controller hears of it, then nothing of it stays on this machine.

use std::time::Duration;

use controller_api::refusal::Refusal;
use controller_api::v1;
use tonic::Code;

use crate::config::{LOCK, Settings, WIREGUARD_LOG};
use crate::kernel::{Datapath, Guard, KernelError, Link, WireGuard};
use crate::uplink::follow::sync_client;
use crate::uplink::identity::{self, Identity, IdentityError, Keys};
use crate::uplink::join::{self, JoinError, ReachError};
use crate::uplink::journal;
use host::error::chain;
use host::file::{self, FileError};

/// Why this machine has not left. It can be tried again.
#[derive(Debug, thiserror::Error)]
pub enum LeaveError {
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(
        "the controller does not know yet that this node leaves ({reason}): try again when it can be reached, or use \
         `--force` and have an admin run `meshctl node delete {name}`"
    )]
    Untold { name: String, reason: String },
    #[error("failed to take the interface down")]
    Kernel(#[source] KernelError),
    #[error(transparent)]
    Disk(#[from] FileError),
}

/// How long the controller may take to answer.
const ANSWER: Duration = Duration::from_secs(10);

/// Tells the controller that this node is to be deleted. `Ok(false)`: it could not be told, and `force` says that this is
/// no reason to stay.
pub async fn tell(settings: &Settings, force: bool) -> Result<bool, LeaveError> {
    let mut identity = match Identity::load(&settings.state_dir) {
        Ok(identity) => identity,
        // Nothing joined, or nothing readable: there may still be an interface and files to remove.
        Err(IdentityError::NotJoined) if !force => return Err(IdentityError::NotJoined.into()),
        Err(_) if force => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    match try_tell(settings, &mut identity).await {
        Ok(()) => Ok(true),
        Err(_) if force => Ok(false),
        Err(reason) => Err(LeaveError::Untold { name: identity.name.to_string(), reason }),
    }
}

async fn try_tell(settings: &Settings, identity: &mut Identity) -> Result<(), String> {
    let keys = Keys::load(&settings.state_dir).map_err(|error| chain(&error))?;
    let channel = match join::reach(&settings.state_dir, identity, &keys).await {
        Ok(channel) => channel,
        Err(ReachError::Again { error: JoinError::NoPart { refusal: Refusal::Deleted, .. }, .. }) => return Ok(()),
        Err(error) => return Err(chain(&error)),
    };
    let mut request = tonic::Request::new(v1::LeaveRequest {});
    request.set_timeout(ANSWER);
    match sync_client(channel).leave(request).await {
        Ok(_) => Ok(()),
        // Deleted already: this node has been told of, by an admin or by an earlier attempt.
        Err(status) if status.code() == Code::NotFound || Refusal::of(&status) == Some(Refusal::Deleted) => Ok(()),
        Err(status) => Err(status.message().to_owned()),
    }
}

/// Removes interface, programs, pins, keys and state. The link goes first: it is never there without its programs.
pub fn remove(
    settings: &Settings,
    wireguard: &mut dyn WireGuard,
    link: &mut dyn Link,
    datapath: &mut dyn Datapath,
    guard: &mut dyn Guard,
) -> Result<(), LeaveError> {
    if link.observe().map_err(LeaveError::Kernel)?.is_some() {
        wireguard.destroy().map_err(LeaveError::Kernel)?;
    }
    // Its pins lie within the policy's.
    guard.detach().map_err(LeaveError::Kernel)?;
    datapath.detach().map_err(LeaveError::Kernel)?;
    journal::remove(&settings.state_dir)?;
    file::remove(&settings.state_dir.join(WIREGUARD_LOG))?;
    identity::remove(&settings.state_dir)?;
    file::remove(&settings.state_dir.join(LOCK))?;
    // If something else is in it, it stays.
    let _ = std::fs::remove_dir(&settings.state_dir);
    Ok(())
}
