//! Who may call what. Each service has a gate, which looks at the caller's certificate and at the network's newest state
//! at every call: a certificate that was signed yesterday says nothing about today.

use std::sync::Arc;
use std::time::Instant;

use tonic::{Request, Status};

use super::caller::{Caller, identify};
use crate::metrics::Metrics;
use crate::socket::principal::Principal;
use crate::socket::throttle::Throttle;
use crate::state::Current;

/// Whom a service answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    Nodes,
    Admins,
    /// Nodes and admins: health and reflection.
    Known,
}

/// Lets callers through a [`Door`].
#[derive(Clone, Debug)]
pub struct Gate {
    pub door: Door,
    pub current: Current,
    pub metrics: Arc<Metrics>,
    pub clock: fn() -> u64,
    pub refusals: Arc<Throttle>,
}

impl tonic::service::Interceptor for Gate {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let principal = request.extensions().get::<Principal>();
        let principal =
            principal.ok_or_else(|| Status::internal("connection shows no caller; report this as a bug"))?;
        let caller = identify(principal, &self.current.get(), (self.clock)()).inspect_err(|status| {
            self.metrics.rejected_certificates.inc();
            self.log(principal, status.message());
        })?;
        self.check(&caller)?;
        request.extensions_mut().insert(caller);
        Ok(request)
    }
}

impl Gate {
    fn log(&self, principal: &Principal, reason: &str) {
        match principal {
            // Anybody can do that, and it says nothing of the network.
            Principal::Anonymous { address } => tracing::debug!(%address, reason, "a call was refused"),
            Principal::Root | Principal::Certified { .. } => {
                if let Some(suppressed) = self.refusals.pass(Instant::now()) {
                    tracing::info!(?principal, reason, suppressed, "a call was refused");
                }
            }
        }
    }

    fn check(&self, caller: &Caller) -> Result<(), Status> {
        match (self.door, caller) {
            (Door::Known, _) | (Door::Nodes, Caller::Node(_)) | (Door::Admins, Caller::Root | Caller::Admin { .. }) => {
                Ok(())
            }
            (Door::Nodes, Caller::Root) => {
                Err(Status::permission_denied("root is no node; nodes call over TLS with their own certificate"))
            }
            (Door::Nodes, Caller::Admin { name }) => Err(Status::permission_denied(format!(
                "admin `{name}` is no node; nodes call with their own certificate"
            ))),
            (Door::Admins, Caller::Node(node)) => Err(Status::permission_denied(format!(
                "node `{}` is no admin; use an admin's identity (`meshctl admin invite NAME`), or root's socket on the \
                 controller's machine",
                node.name
            ))),
        }
    }
}
