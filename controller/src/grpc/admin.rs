//! What `meshctl` asks for.

use controller_api::defaults::{ADMIN_CERTIFICATE_LIFETIME, AUDIT_LIMIT, HISTORY_LIMIT, INVITATION_LIFETIME};
use controller_api::endpoint::ControllerEndpoint;
use controller_api::identity::{Identity, is_admin_name};
use controller_api::invitation::{Invitation, Secret, Subject};
use controller_api::v1::admin_server::Admin;
use controller_api::{ConvertError, v1};
use policy::{Change, Revision};
use prost::Message as _;
use sha2::{Digest as _, Sha256};
use tonic::{Request, Response, Status};

use super::archive::Archive;
use super::{Context, refused, text};
use crate::access::authority::CertificateRequest;
use crate::access::caller::Caller;
use crate::change;
use crate::change::audit::Actor;
use crate::change::writer::Ask;
use crate::state::State;
use crate::state::directory::Directory;
use crate::store;
use crate::store::account::SecretHash;

/// Most audit entries, or revisions, in one answer.
const ENTRIES_MAX: usize = 10_000;
/// Most endpoints in one invitation.
const ENDPOINTS_MAX: usize = 16;

/// The service `Admin`.
#[derive(Debug)]
pub struct AdminService {
    context: Context,
    archive: Archive,
}

impl AdminService {
    pub fn new(context: Context) -> Self {
        let archive = Archive::new(std::sync::Arc::clone(&context.store), context.current.clone());
        Self { context, archive }
    }

    async fn ask(&self, ask: Ask) -> Result<crate::change::writer::Answer, Status> {
        self.context.writer.ask(ask).await.map_err(|refusal| refused(&refusal))
    }
}

/// Who calls; the gate has put it there.
fn actor<T>(request: &Request<T>) -> Result<Actor, Status> {
    let caller = request.extensions().get::<Caller>().map(Caller::actor);
    caller.ok_or_else(|| Status::internal("call came past its gate; report this as a bug"))
}

fn invalid(error: &dyn std::error::Error) -> Status {
    Status::invalid_argument(text(error))
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn get_network(
        &self,
        request: Request<v1::GetNetworkRequest>,
    ) -> Result<Response<v1::GetNetworkResponse>, Status> {
        let v1::GetNetworkRequest { revision } = request.into_inner();
        self.archive.network(Revision(revision)).await.map(Response::new)
    }

    async fn change(&self, request: Request<v1::ChangeRequest>) -> Result<Response<v1::ChangeResponse>, Status> {
        let actor = actor(&request)?;
        let mut request = request.into_inner();
        let request_id = std::mem::take(&mut request.request_id);
        let digest = Sha256::digest(request.encode_to_vec()).into();
        let v1::ChangeRequest { request_id: _, expected_revision, changes, dry_run } = request;
        let changes: Vec<Change> = changes
            .into_iter()
            .map(Change::try_from)
            .collect::<Result<_, ConvertError>>()
            .map_err(|error| invalid(&error))?;
        let id = (!request_id.is_empty() && !dry_run).then_some(request_id);
        let ask = Ask {
            id: id.map(|id| store::RequestId { id: format!("change/{id}"), digest }),
            expected: (expected_revision != 0).then_some(Revision(expected_revision)),
            dry_run,
            ..Ask::new(actor, change::Request::Change(changes))
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

    async fn get_status(&self, _: Request<v1::GetStatusRequest>) -> Result<Response<v1::GetStatusResponse>, Status> {
        let state = self.context.current.get();
        let status = |node: &policy::NodeId| {
            let report = self.context.dispatch.reports.of(*node);
            v1::NodeStatus {
                node: node.0,
                connected: report.connected,
                last_seen: report.last_seen,
                sent: report.sent.0,
                enforced: report.enforced.0,
                generation: report.generation.0,
                error: report.error,
                version: report.version,
                endpoint: endpoint(&state, &self.context.dispatch.directory, *node),
                lacks: report.lacks,
            }
        };
        let nodes = state.network().nodes().keys().map(status).collect();
        let version = crate::VERSION.to_owned();
        Ok(Response::new(v1::GetStatusResponse { revision: state.policy.revision.0, version, nodes }))
    }

    async fn list_admins(&self, _: Request<v1::ListAdminsRequest>) -> Result<Response<v1::ListAdminsResponse>, Status> {
        let state = self.context.current.get();
        let admins = state.accounts.admins().iter().map(|(name, admin)| v1::AdminAccount {
            name: name.clone(),
            certificate_expires_at: admin.certificate_expires_at,
            revoked: admin.revoked,
        });
        Ok(Response::new(v1::ListAdminsResponse { admins: admins.collect() }))
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
            .map_err(|error| Status::internal(text(&error)))?;
        Ok(Response::new(v1::RenewResponse { certificate }))
    }

    async fn list_audit(
        &self,
        request: Request<v1::ListAuditRequest>,
    ) -> Result<Response<v1::ListAuditResponse>, Status> {
        let v1::ListAuditRequest { limit } = request.into_inner();
        let entries = self.archive.audit(bounded(limit, AUDIT_LIMIT)).await?;
        let entry = |entry: store::AuditEntry| {
            let store::AuditEntry { revision, time, actor, change } = entry;
            v1::AuditEntry { revision: revision.0, time, actor, change }
        };
        Ok(Response::new(v1::ListAuditResponse { entries: entries.into_iter().map(entry).collect() }))
    }

    async fn list_history(
        &self,
        request: Request<v1::ListHistoryRequest>,
    ) -> Result<Response<v1::ListHistoryResponse>, Status> {
        let v1::ListHistoryRequest { limit } = request.into_inner();
        self.archive.history(bounded(limit, HISTORY_LIMIT)).await.map(Response::new)
    }
}

/// Where a node is reached: where an operator says, else where it was seen.
fn endpoint(state: &State, directory: &Directory, node: policy::NodeId) -> String {
    let configured = state.network().nodes().get(&node).and_then(|node| node.endpoint);
    configured.or_else(|| directory.get(node)).map(|endpoint| endpoint.to_string()).unwrap_or_default()
}

/// How many entries are listed; 0: as many as usual.
fn bounded(limit: u32, usual: usize) -> usize {
    match usize::try_from(limit).unwrap_or(ENTRIES_MAX) {
        0 => usual,
        limit => limit.min(ENTRIES_MAX),
    }
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
