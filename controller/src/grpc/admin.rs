//! What `meshctl` asks for.

use controller_api::defaults::{ADMIN_CERTIFICATE_LIFETIME, AUDIT_LIMIT, HISTORY_LIMIT, INVITATION_LIFETIME, LIST_MAX};
use controller_api::endpoint::ControllerEndpoint;
use controller_api::identity::{Identity, is_admin_name};
use controller_api::invitation::{Invitation, Secret, Subject};
use controller_api::v1::admin_server::Admin;
use controller_api::{ConvertError, v1};
use host::error::chain;
use policy::{Change, Revision};
use prost::Message as _;
use sha2::{Digest as _, Sha256};
use tonic::{Request, Response, Status};

use super::archive::Archive;
use super::{Context, refused};
use crate::access::authority::CertificateRequest;
use crate::access::caller::Caller;
use crate::access::questions::Cost;
use crate::change;
use crate::change::audit::Actor;
use crate::change::trial;
use crate::change::writer::Ask;
use crate::state::State;
use crate::state::directory::Directory;
use crate::store::account::SecretHash;
use crate::store::{self, Range, Wanted};

/// Most endpoints in one invitation.
const ENDPOINTS_MAX: usize = 16;

/// The service `Admin`.
#[derive(Debug)]
pub struct AdminService {
    context: Context,
}

impl AdminService {
    pub fn new(context: Context) -> Self {
        Self { context }
    }

    async fn ask(&self, ask: Ask) -> Result<crate::change::writer::Answer, Status> {
        self.context.writer.ask(ask).await.map_err(|refusal| refused(&refusal))
    }

    /// What would come of changes.
    async fn attempt(
        &self,
        caller: &Caller,
        changes: Vec<Change>,
        expected: Option<Revision>,
    ) -> Result<v1::ChangeResponse, Status> {
        let (state, actor, now) = (self.context.current.get(), caller.actor(), self.context.now());
        let attempt = move |_: &Wanted| {
            let revision = state.policy.revision;
            let outcome = trial::check_expected(expected, revision)
                .and_then(|()| trial::attempt(&state, &actor, &change::Request::Change(changes), now))
                .map_err(|refusal| refused(&refusal))?;
            Ok(v1::ChangeResponse { revision: revision.0, warnings: outcome.warnings })
        };
        self.context.questions.ask(caller, Cost::High, attempt).await
    }
}

/// Who calls; the gate has put it there.
fn caller<T>(request: &Request<T>) -> Result<Caller, Status> {
    let caller = request.extensions().get::<Caller>().cloned();
    caller.ok_or_else(|| Status::internal("call came past its gate; report this as a bug"))
}

fn actor<T>(request: &Request<T>) -> Result<Actor, Status> {
    caller(request).map(|caller| caller.actor())
}

fn invalid(error: &dyn std::error::Error) -> Status {
    Status::invalid_argument(chain(error))
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn get_network(
        &self,
        request: Request<v1::GetNetworkRequest>,
    ) -> Result<Response<v1::GetNetworkResponse>, Status> {
        let caller = caller(&request)?;
        let v1::GetNetworkRequest { revision } = request.into_inner();
        Archive(&self.context).network(&caller, Revision(revision)).await.map(Response::new)
    }

    async fn change(&self, request: Request<v1::ChangeRequest>) -> Result<Response<v1::ChangeResponse>, Status> {
        let caller = caller(&request)?;
        let mut request = request.into_inner();
        let request_id = std::mem::take(&mut request.request_id);
        let digest = Sha256::digest(request.encode_to_vec()).into();
        let v1::ChangeRequest { request_id: _, expected_revision, changes, dry_run } = request;
        let changes: Vec<Change> = changes
            .into_iter()
            .map(Change::try_from)
            .collect::<Result<_, ConvertError>>()
            .map_err(|error| invalid(&error))?;
        let expected = (expected_revision != 0).then_some(Revision(expected_revision));
        if dry_run {
            return self.attempt(&caller, changes, expected).await.map(Response::new);
        }
        let id = (!request_id.is_empty()).then_some(request_id);
        let ask = Ask {
            id: id.map(|id| store::RequestId { id: format!("change/{id}"), digest }),
            expected,
            ..Ask::new(caller.actor(), change::Request::Change(changes))
        };
        let answer = self.ask(ask).await?;
        let warnings = answer.outcome.warnings;
        Ok(Response::new(v1::ChangeResponse { revision: answer.revision.0, warnings }))
    }

    async fn invite(&self, request: Request<v1::InviteRequest>) -> Result<Response<v1::InviteResponse>, Status> {
        let actor = actor(&request)?;
        let v1::InviteRequest { subject, expires_in, endpoints } = request.into_inner();
        let subject = subject_of(subject)?;
        let state = self.context.current.get();
        let endpoints = if endpoints.is_empty() { state.accounts.settings.endpoints.clone() } else { endpoints };
        let endpoints = check_endpoints(&endpoints)?;
        let mut random = [0; 32];
        getrandom::fill(&mut random)
            .map_err(|error| Status::internal(format!("no random bytes could be had: {error}")))?;
        let secret = Secret::new(random);
        let expires_in = if expires_in == 0 { INVITATION_LIFETIME.as_secs() } else { expires_in };
        let expires_at = self.context.now().saturating_add(expires_in);
        let asked = change::Request::Invite { subject: subject.clone(), hash: SecretHash(secret.hash()), expires_at };
        self.ask(Ask::new(actor, asked)).await?;
        let invitation = Invitation {
            network: state.network().name().clone(),
            subject,
            endpoints,
            fingerprint: self.context.authority.fingerprint(),
            secret,
            expires_at,
        };
        Ok(Response::new(v1::InviteResponse { invitation: invitation.to_string(), expires_at }))
    }

    async fn get_status(
        &self,
        request: Request<v1::GetStatusRequest>,
    ) -> Result<Response<v1::GetStatusResponse>, Status> {
        let (state, dispatch) = (self.context.current.get(), self.context.dispatch.clone());
        let statuses = move |wanted: &Wanted| {
            let status = |node: &policy::NodeId| {
                let report = dispatch.reports.of(*node);
                v1::NodeStatus {
                    node: node.0,
                    connected: report.connected,
                    last_seen: report.last_seen,
                    sent: report.sent.0,
                    enforced: report.enforced.0,
                    generation: report.generation.0,
                    error: report.error,
                    version: report.version,
                    endpoint: endpoint(&state, &dispatch.directory, *node),
                    lacks: report.lacks,
                }
            };
            let nodes = state.network().nodes().keys().take_while(|_| !wanted.is_over()).map(status).collect();
            let version = crate::VERSION.to_owned();
            Ok(v1::GetStatusResponse { revision: state.policy.revision.0, version, nodes })
        };
        self.context.questions.ask(&caller(&request)?, Cost::Low, statuses).await.map(Response::new)
    }

    async fn list_admins(
        &self,
        request: Request<v1::ListAdminsRequest>,
    ) -> Result<Response<v1::ListAdminsResponse>, Status> {
        let state = self.context.current.get();
        let list = move |_: &Wanted| {
            let admins = state.accounts.admins().iter().map(|(name, admin)| v1::AdminAccount {
                name: name.clone(),
                certificate_expires_at: admin.certificate_expires_at,
                revoked: admin.revoked,
            });
            Ok(v1::ListAdminsResponse { admins: admins.collect() })
        };
        self.context.questions.ask(&caller(&request)?, Cost::Low, list).await.map(Response::new)
    }

    async fn revoke_admin(
        &self,
        request: Request<v1::RevokeAdminRequest>,
    ) -> Result<Response<v1::RevokeAdminResponse>, Status> {
        let actor = actor(&request)?;
        let v1::RevokeAdminRequest { name } = request.into_inner();
        self.ask(Ask::new(actor, change::Request::RevokeAdmin(name))).await?;
        Ok(Response::new(v1::RevokeAdminResponse {}))
    }

    async fn renew(&self, request: Request<v1::RenewRequest>) -> Result<Response<v1::RenewResponse>, Status> {
        let name = match request.extensions().get::<Caller>() {
            Some(Caller::Admin { name }) => name.clone(),
            _ => {
                return Err(Status::failed_precondition(
                    "there is no certificate to renew; only an admin's connection over TLS has one",
                ));
            }
        };
        self.context.questions.pace(&caller(&request)?)?;
        let v1::RenewRequest { certificate_request } = request.into_inner();
        let request = CertificateRequest::parse(&certificate_request).map_err(|error| invalid(&error))?;
        let now = self.context.now();
        let certificate_expires_at = now + ADMIN_CERTIFICATE_LIFETIME.as_secs();
        let asked =
            change::Request::RenewAdmin { name: name.clone(), requested: request.key(), certificate_expires_at };
        self.ask(Ask::new(Actor::Admin(name.clone()), asked)).await?;
        let certificate = self
            .context
            .authority
            .sign(&request, &Identity::Admin(name), now, ADMIN_CERTIFICATE_LIFETIME)
            .map_err(|error| Status::internal(chain(&error)))?;
        Ok(Response::new(v1::RenewResponse { certificate }))
    }

    async fn list_audit(
        &self,
        request: Request<v1::ListAuditRequest>,
    ) -> Result<Response<v1::ListAuditResponse>, Status> {
        let caller = caller(&request)?;
        let v1::ListAuditRequest { limit, before } = request.into_inner();
        Archive(&self.context).audit(&caller, range(before, limit, AUDIT_LIMIT)).await.map(Response::new)
    }

    async fn list_history(
        &self,
        request: Request<v1::ListHistoryRequest>,
    ) -> Result<Response<v1::ListHistoryResponse>, Status> {
        let caller = caller(&request)?;
        let v1::ListHistoryRequest { limit, before } = request.into_inner();
        Archive(&self.context).history(&caller, range(before, limit, HISTORY_LIMIT)).await.map(Response::new)
    }
}

/// Where a node is reached: where an operator says, else where it was seen.
fn endpoint(state: &State, directory: &Directory, node: policy::NodeId) -> String {
    let configured = state.network().nodes().get(&node).and_then(|node| node.endpoint);
    configured.or_else(|| directory.get(node)).map(|endpoint| endpoint.to_string()).unwrap_or_default()
}

/// What is listed; a limit of 0: as many as usual.
fn range(before: u64, limit: u32, usual: usize) -> Range {
    let limit = match usize::try_from(limit).unwrap_or(LIST_MAX) {
        0 => usual,
        limit => limit.min(LIST_MAX),
    };
    Range { before: (before != 0).then_some(Revision(before)), limit }
}

fn subject_of(subject: Option<v1::invite_request::Subject>) -> Result<Subject, Status> {
    match subject {
        Some(v1::invite_request::Subject::Node(name)) => {
            Ok(Subject::Node(name.parse().map_err(|error: policy::NameError| invalid(&error))?))
        }
        Some(v1::invite_request::Subject::Admin(name)) if is_admin_name(&name) => Ok(Subject::Admin(name)),
        Some(v1::invite_request::Subject::Admin(name)) => Err(Status::invalid_argument(format!(
            "`{name}` is no admin's name; use 1 to 63 of a-z, 0-9, `.`, `_`, `-`, with a letter or digit at both ends"
        ))),
        None => Err(Status::invalid_argument("invitation is for nobody; name a node or an admin")),
    }
}

fn check_endpoints(endpoints: &[String]) -> Result<Vec<String>, Status> {
    if endpoints.is_empty() || endpoints.len() > ENDPOINTS_MAX {
        return Err(Status::invalid_argument(format!(
            "invitation would have {} endpoints, not 1 to {ENDPOINTS_MAX}; give some with `--endpoint`",
            endpoints.len()
        )));
    }
    let parse = |text: &String| match text.parse::<ControllerEndpoint>() {
        Ok(endpoint) => Ok(endpoint.to_string()),
        Err(error) => Err(invalid(&error)),
    };
    endpoints.iter().map(parse).collect()
}
