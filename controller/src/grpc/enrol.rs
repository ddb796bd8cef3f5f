//! Letting the invited in: the one service for callers without a certificate.

use std::time::Instant;

use controller_api::defaults::{ADMIN_CERTIFICATE_LIFETIME, NODE_CERTIFICATE_LIFETIME};
use controller_api::identity::Identity;
use controller_api::invitation::Secret;
use controller_api::refusal;
use controller_api::v1;
use controller_api::v1::enrol_server::Enrol;
use host::error::chain;
use policy::PublicKey;
use tonic::{Request, Response, Status};

use super::{Context, refused};
use crate::access::authority::CertificateRequest;
use crate::change;
use crate::change::audit::Actor;
use crate::change::enrol::RedeemError;
use crate::change::request::Refusal;
use crate::change::writer::Ask;
use crate::metrics;
use crate::socket::principal::Principal;
use crate::socket::throttle::Throttle;
use crate::store::account::{Keys, SecretHash};

/// The service `Enrol`.
#[derive(Debug)]
pub struct EnrolService {
    context: Context,
    refusals: Throttle,
}

impl EnrolService {
    pub fn new(context: Context) -> Self {
        Self { context, refusals: Throttle::default() }
    }

    async fn enrol(&self, request: v1::RedeemRequest) -> Result<v1::RedeemResponse, Status> {
        let v1::RedeemRequest { secret, certificate_request, wireguard_public_key } = request;
        let secret = Secret::try_from(&secret[..]).map_err(|error| Status::invalid_argument(chain(&error)))?;
        let request =
            CertificateRequest::parse(&certificate_request).map_err(|error| Status::invalid_argument(chain(&error)))?;
        let wireguard = match &wireguard_public_key[..] {
            [] => None,
            bytes => Some(PublicKey::try_from(bytes).map_err(|error| Status::invalid_argument(chain(&error)))?),
        };
        let now = self.context.now();
        let keys = Keys { certificate: request.key(), wireguard };
        let asked = change::Request::Redeem {
            hash: SecretHash(secret.hash()),
            keys,
            certificate_expires_at: now + ADMIN_CERTIFICATE_LIFETIME.as_secs(),
        };
        let answer = self.context.writer.ask(Ask::new(Actor::Controller, asked)).await;
        let redeemed = answer
            .map_err(|refusal| marked(&refusal))?
            .outcome
            .redeemed
            .ok_or_else(|| Status::internal("invitation let nobody in; report this as a bug"))?;
        let (lifetime, node) = match &redeemed.identity {
            Identity::Node(id) => (NODE_CERTIFICATE_LIFETIME, id.0),
            _ => (ADMIN_CERTIFICATE_LIFETIME, 0),
        };
        let authority = &self.context.authority;
        let certificate = authority
            .sign(&request, &redeemed.identity, now, lifetime)
            .map_err(|error| Status::internal(chain(&error)))?;
        Ok(v1::RedeemResponse {
            certificate,
            authority: authority.certificate().to_vec(),
            network: authority.network().to_string(),
            name: redeemed.name,
            node,
        })
    }
}

/// A node whose certificate has expired comes with its invitation again, and hears here that it has no part any more.
fn marked(refusal: &Refusal) -> Status {
    let status = refused(refusal);
    match refusal {
        // One that was redeemed is only forgotten with its node, or for a newer one that was.
        Refusal::Redeem(RedeemError::Unknown { .. }) => refusal::Refusal::Deleted.mark(status),
        Refusal::Redeem(RedeemError::NotActive { .. }) => refusal::Refusal::NotActive.mark(status),
        _ => status,
    }
}

#[tonic::async_trait]
impl Enrol for EnrolService {
    async fn redeem(&self, request: Request<v1::RedeemRequest>) -> Result<Response<v1::RedeemResponse>, Status> {
        let ip = request.extensions().get::<Principal>().and_then(Principal::ip);
        let result = self.enrol(request.into_inner()).await;
        match &result {
            Ok(response) => {
                self.context.metrics.enrolment(metrics::Result::Done);
                tracing::info!(name = response.name, ?ip, "an invitation was redeemed");
            }
            Err(status) if status.code() == tonic::Code::Internal => {
                self.context.metrics.enrolment(metrics::Result::Failed);
                tracing::error!(reason = status.message(), ?ip, "an invitation could not be redeemed");
            }
            Err(status) => {
                self.context.metrics.enrolment(metrics::Result::Refused);
                if let Some(suppressed) = self.refusals.pass(Instant::now()) {
                    tracing::warn!(reason = status.message(), ?ip, suppressed, "an invitation was refused");
                }
            }
        }
        result.map(Response::new)
    }
}
