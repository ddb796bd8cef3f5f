//! How to reach the controller, and the calls that every verb makes of it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;
use controller_api::defaults::{
    AUDIT_LIMIT, CONTROLLER_SOCKET, HISTORY_LIMIT, LIST_MAX, MAX_RESPONSE, REQUEST_TIMEOUT,
};
use controller_api::endpoint::ControllerEndpoint;
use controller_api::v1::admin_client::AdminClient;
use controller_api::{client, v1};
use policy::{Change, Network, Revision};
use tonic::Request;
use tonic::transport::Channel;

use crate::identity::AdminIdentity;
use crate::{Failure, say, time, warn};

#[derive(Debug, Args)]
#[command(next_help_heading = "Connection")]
pub(crate) struct ConnectionArgs {
    /// The controller's Unix socket, for root on its machine
    #[arg(long, global = true, value_name = "PATH", env = "RAMPART_SOCKET", default_value = CONTROLLER_SOCKET)]
    pub(crate) socket: PathBuf,
    /// A controller elsewhere; needs an identity from `meshctl admin join`
    #[arg(long, global = true, value_name = "HOST:PORT", env = "RAMPART_CONTROLLER")]
    pub(crate) controller: Vec<ControllerEndpoint>,
    /// Where this admin's key and certificate are [default: ~/.config/rampart]
    #[arg(long, global = true, value_name = "DIR", env = "RAMPART_IDENTITY")]
    pub(crate) identity: Option<PathBuf>,
    /// Change nothing; only say whether the controller would
    #[arg(long, global = true)]
    pub(crate) dry_run: bool,
}

/// A connection as one admin.
pub(crate) struct Session {
    client: AdminClient<Channel>,
    pub(crate) dry_run: bool,
}

impl Session {
    /// Over the Unix socket, unless a controller or an identity is named. Without either, and without a socket here, the
    /// identity in its usual place will do.
    pub(crate) async fn open(arguments: &ConnectionArgs) -> Result<Self, Failure> {
        let remote = !arguments.controller.is_empty() || arguments.identity.is_some();
        let identity = if remote || !arguments.socket.exists() {
            let dir = AdminIdentity::dir(arguments.identity.as_deref())?;
            if remote || AdminIdentity::is_in(&dir) { Some(AdminIdentity::load(&dir)?) } else { None }
        } else {
            None
        };
        let admin = |channel| AdminClient::new(channel).max_decoding_message_size(MAX_RESPONSE);
        let client = match identity {
            None => admin(client::connect_unix(&arguments.socket).await?),
            Some(identity) => {
                let endpoints = match arguments.controller.is_empty() {
                    true => identity.endpoints.clone(),
                    false => arguments.controller.iter().map(ControllerEndpoint::to_string).collect(),
                };
                let channel = client::connect(&endpoints, &identity.trust(), Some(&identity.credentials)).await?;
                let mut client = admin(channel);
                if !arguments.dry_run {
                    identity.renew_if_due(&mut client, time::now()).await.iter().for_each(warn);
                }
                client
            }
        };
        Ok(Self { client, dry_run: arguments.dry_run })
    }

    /// All objects, at one revision.
    pub(crate) async fn network(&mut self) -> Result<(Revision, Network), Failure> {
        self.network_at(None).await
    }

    /// All objects, as they were at a revision; `None`: as they are.
    pub(crate) async fn network_at(&mut self, revision: Option<Revision>) -> Result<(Revision, Network), Failure> {
        let request = v1::GetNetworkRequest { revision: revision.unwrap_or_default().0 };
        let answer = self.client.get_network(timed(request)).await?.into_inner();
        let v1::GetNetworkResponse { revision, network } = answer;
        let network = network.ok_or_else(|| Failure::failed("controller sent no network; restart `controllerd`"))?;
        Ok((Revision(revision), Network::try_from(network)?))
    }

    /// Where each node is reached, by its id; of those of which it is known.
    pub(crate) async fn endpoints(&mut self) -> Result<BTreeMap<u32, String>, Failure> {
        let nodes = self.status().await?.nodes.into_iter().filter(|node| !node.endpoint.is_empty());
        Ok(nodes.map(|node| (node.node, node.endpoint)).collect())
    }

    /// Makes one change, and says so.
    pub(crate) async fn change(&mut self, change: Change, done: impl AsRef<str>) -> Result<(), Failure> {
        let done = done.as_ref();
        let revision = self.commit(&[change]).await?;
        match self.dry_run {
            true => say(format!("dry run, nothing was changed: {done}")),
            false => say(format!("{done} (revision {revision})")),
        }
        Ok(())
    }

    /// Makes changes, all or none, and prints the controller's warnings.
    pub(crate) async fn commit(&mut self, changes: &[Change]) -> Result<Revision, Failure> {
        let request = v1::ChangeRequest {
            request_id: request_id()?,
            expected_revision: 0,
            changes: changes.iter().map(v1::Change::try_from).collect::<Result<_, _>>()?,
            dry_run: self.dry_run,
        };
        let v1::ChangeResponse { revision, warnings } = self.client.change(timed(request)).await?.into_inner();
        warnings.iter().for_each(warn);
        Ok(Revision(revision))
    }

    pub(crate) async fn invite(&mut self, request: v1::InviteRequest) -> Result<v1::InviteResponse, Failure> {
        Ok(self.client.invite(timed(request)).await?.into_inner())
    }

    pub(crate) async fn status(&mut self) -> Result<v1::GetStatusResponse, Failure> {
        Ok(self.client.get_status(timed(v1::GetStatusRequest {})).await?.into_inner())
    }

    pub(crate) async fn admins(&mut self) -> Result<Vec<v1::AdminAccount>, Failure> {
        Ok(self.client.list_admins(timed(v1::ListAdminsRequest {})).await?.into_inner().admins)
    }

    pub(crate) async fn revoke_admin(&mut self, name: String) -> Result<(), Failure> {
        self.client.revoke_admin(timed(v1::RevokeAdminRequest { name })).await?;
        Ok(())
    }

    pub(crate) async fn history(&mut self, range: Range) -> Result<Vec<v1::PastRevision>, Failure> {
        let request = v1::ListHistoryRequest { limit: range.limit, before: range.before() };
        let v1::ListHistoryResponse { revisions, oldest, cut } =
            self.client.list_history(timed(request)).await?.into_inner();
        range.say_where_it_ends(cut, revisions.last().map(|past| past.revision));
        if !cut && oldest > 0 && revisions.len() < range.limit as usize {
            say(format!("what was before revision `{}` is not kept", oldest + 1));
        }
        Ok(revisions)
    }

    pub(crate) async fn audit(&mut self, range: Range) -> Result<Vec<v1::AuditEntry>, Failure> {
        let request = v1::ListAuditRequest { limit: range.limit, before: range.before() };
        let v1::ListAuditResponse { entries, cut } = self.client.list_audit(timed(request)).await?.into_inner();
        range.say_where_it_ends(cut, entries.last().map(|entry| entry.revision));
        Ok(entries)
    }
}

// One default for both lists.
const _: () = assert!(AUDIT_LIMIT == HISTORY_LIMIT);

/// What of a list is asked for.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Range {
    /// At most this many, newest first
    #[arg(long, value_name = "N", default_value_t = HISTORY_LIMIT as u32, value_parser = limit)]
    limit: u32,
    /// Only what is older than this revision
    #[arg(long, value_name = "REVISION", value_parser = revision)]
    before: Option<u64>,
}

impl Range {
    fn before(self) -> u64 {
        self.before.unwrap_or_default()
    }

    fn say_where_it_ends(self, is_cut: bool, last: Option<u64>) {
        if let (true, Some(last)) = (is_cut, last) {
            say(format!("the list is long and ends with revision `{last}`; older ones: `--before {last}`"));
        }
    }
}

fn limit(text: &str) -> Result<u32, String> {
    let limit = text.parse().ok().filter(|limit| (1..=LIST_MAX).contains(&(*limit as usize)));
    limit.ok_or_else(|| format!("it must be a number from 1 to {LIST_MAX}"))
}

/// A revision, as typed.
pub(crate) fn revision(text: &str) -> Result<u64, String> {
    let revision = text.parse().ok().filter(|revision| *revision > 0);
    revision.ok_or_else(|| "it must be a number from 1 on; `meshctl history` lists the revisions".to_owned())
}

/// A request that is given up after a while.
pub(crate) fn timed<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(REQUEST_TIMEOUT);
    request
}

/// Unique, so that the controller can tell a repeated request from a new one.
fn request_id() -> Result<String, Failure> {
    let mut bytes = [0_u8; 16];
    getrandom::fill(&mut bytes).map_err(|error| Failure::failed(format!("no random numbers: {error}")))?;
    Ok(hex::encode(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_revision_or_limit_is_refused_with_what_would_be() {
        assert_eq!((revision("120"), limit("10000")), (Ok(120), Ok(10_000)));
        for text in ["0", "-1", "words", "1.5", "18446744073709551616", ""] {
            assert!(revision(text).expect_err(text).contains("meshctl history"), "{text}");
            assert!(limit(text).expect_err(text).contains("1 to 10000"), "{text}");
        }
        assert!(limit("10001").is_err());
    }
}
