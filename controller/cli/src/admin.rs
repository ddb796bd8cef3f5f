//! `meshctl admin …`

use std::fmt;

use clap::{Args, Subcommand};
use controller_api::client;
use controller_api::defaults::INVITATION_LIFETIME;
use controller_api::endpoint::ControllerEndpoint;
use controller_api::invitation::{Invitation, Subject};
use controller_api::time::{timestamp, timestamp_or_none};
use controller_api::tls::{self, Trust};
use controller_api::v1;
use controller_api::v1::enrol_client::EnrolClient;
use serde::Serialize;
use zeroize::Zeroizing;

use crate::connection::{ConnectionArgs, timed};
use crate::identity::{self, AdminIdentity, Profile};
use crate::output::{self, OutputArgs, Row};
use crate::time::{self, Lifetime};
use crate::{Failure, Session, say};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Print an invitation of an admin, one line
    #[command(after_help = "\
Examples:
  meshctl admin invite alice
  meshctl admin invite alice --expires 1h

On the admin's own machine: meshctl admin join 'rampart1:…'")]
    Invite(Invite),
    /// List the admins
    #[command(after_help = "Example:\n  meshctl admin list")]
    List(OutputArgs),
    /// Refuse an admin's certificate from now on
    #[command(after_help = "Example:\n  meshctl admin revoke alice")]
    Revoke {
        /// The admin's name
        #[arg(value_parser = parse_name)]
        name: String,
    },
    /// Become an admin by an invitation, on this machine
    #[command(after_help = "\
The private key is made here and never leaves this machine. Key and certificate are kept
where `--identity` says; with them every command reaches the controller over TLS.

Example, with the line that `meshctl admin invite alice` printed:
  meshctl admin join \"$INVITATION\"")]
    Join(Join),
}

#[derive(Debug, Args)]
pub(crate) struct Invite {
    /// The admin's name
    #[arg(value_parser = parse_name)]
    name: String,
    /// How long the invitation can be redeemed
    #[arg(long, value_name = "SPAN", default_value_t = Lifetime(INVITATION_LIFETIME))]
    expires: Lifetime,
    /// The controller's endpoint to write into the invitation [default: what `controllerd` is configured with]
    #[arg(long = "endpoint", value_name = "HOST:PORT")]
    endpoints: Vec<ControllerEndpoint>,
}

#[derive(Args)]
pub(crate) struct Join {
    /// The line that `meshctl admin invite` printed
    // Parsed later: a refused argument would be echoed, and this one holds a secret.
    invitation: String,
    /// Replace the identity that is already there
    #[arg(long)]
    replace: bool,
}

impl fmt::Debug for Join {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Join").field("invitation", &"redacted").field("replace", &self.replace).finish()
    }
}

impl Command {
    pub(crate) async fn run(self, session: &mut Session) -> Result<(), Failure> {
        match self {
            Self::Invite(invite) => invite.run(session).await,
            Self::List(OutputArgs { format }) => {
                let rows: Vec<_> = session.admins().await?.into_iter().map(AdminRow::from).collect();
                output::list(&rows, format)
            }
            Self::Revoke { name } => {
                session.revoke_admin(name.clone()).await?;
                say(format!("admin `{name}` revoked"));
                Ok(())
            }
            // It needs no session, and was taken care of before there was one.
            Self::Join(_) => Ok(()),
        }
    }
}

impl Invite {
    async fn run(self, session: &mut Session) -> Result<(), Failure> {
        let Self { name, expires, endpoints } = self;
        let request = v1::InviteRequest {
            subject: Some(v1::invite_request::Subject::Admin(name.clone())),
            expires_in: expires.0.as_secs(),
            endpoints: endpoints.iter().map(ControllerEndpoint::to_string).collect(),
        };
        let v1::InviteResponse { invitation, expires_at } = session.invite(request).await?;
        say(format!(
            "invitation of admin `{name}`, good until {}; on that machine: meshctl admin join '…'",
            timestamp(expires_at)
        ));
        output::line(&invitation)
    }
}

/// Makes a key, redeems the invitation, keeps what comes back.
pub(crate) async fn join(join: Join, connection: &ConnectionArgs) -> Result<(), Failure> {
    let Join { invitation, replace } = join;
    let invitation: Invitation = Zeroizing::new(invitation).parse().map_err(Failure::usage)?;
    let name = match &invitation.subject {
        Subject::Admin(name) => name.clone(),
        Subject::Node(node) => {
            return Err(Failure::usage(format!(
                "this is the invitation of node `{node}`; use it there with `noded join`"
            )));
        }
    };
    if invitation.is_expired(time::now()) {
        return Err(Failure::failed(format!(
            "invitation expired at {}; ask for a new one by `meshctl admin invite {name}`",
            timestamp(invitation.expires_at)
        )));
    }
    let dir = AdminIdentity::dir(connection.identity.as_deref())?;
    if AdminIdentity::is_in(&dir) && !replace {
        return Err(Failure::failed(format!(
            "there is already an identity in `{}`; name another directory with `--identity DIR`, or add `--replace`",
            dir.display()
        )));
    }
    let endpoints = match connection.controller.is_empty() {
        true => invitation.endpoints.clone(),
        false => connection.controller.iter().map(ControllerEndpoint::to_string).collect(),
    };
    let channel = client::connect(&endpoints, &Trust::Fingerprint(invitation.fingerprint), None).await?;
    let key = identity::pending_key(&dir)?;
    let request = v1::RedeemRequest {
        secret: invitation.secret.as_bytes().to_vec(),
        certificate_request: identity::certificate_request(&key)
            .map_err(|error| Failure::failed(format!("cannot make a certificate request: {error}")))?,
        wireguard_public_key: Vec::new(),
    };
    let answer = EnrolClient::new(channel).redeem(timed(request)).await?.into_inner();
    let v1::RedeemResponse { certificate, authority, network, name: named, node: _ } = answer;
    if tls::fingerprint(&authority) != invitation.fingerprint || named != name || network != invitation.network.as_ref()
    {
        return Err(Failure::failed(
            "controller answered for another network or name than it was asked; ask for a new invitation",
        ));
    }
    let profile = Profile { network, name: named, endpoints };
    identity::store(&dir, &profile, &certificate, &authority)?;
    say(format!("this is now admin `{name}` of network `{}`; identity kept in `{}`", profile.network, dir.display()));
    Ok(())
}

fn parse_name(text: &str) -> Result<String, policy::NameError> {
    text.parse::<policy::NodeName>().map(|name| name.to_string())
}

#[derive(Debug, Serialize)]
struct AdminRow {
    name: String,
    revoked: bool,
    certificate_expires_at: Option<String>,
}

impl From<v1::AdminAccount> for AdminRow {
    fn from(account: v1::AdminAccount) -> Self {
        let v1::AdminAccount { name, certificate_expires_at, revoked } = account;
        Self { name, revoked, certificate_expires_at: timestamp_or_none(certificate_expires_at) }
    }
}

impl Row for AdminRow {
    const HEADINGS: &'static [&'static str] = &["NAME", "STATE", "CERTIFICATE EXPIRES"];

    fn cells(&self) -> Vec<String> {
        let state = match (self.revoked, &self.certificate_expires_at) {
            (true, _) => "revoked",
            (false, Some(_)) => "active",
            (false, None) => "invited",
        };
        vec![self.name.clone(), state.to_owned(), self.certificate_expires_at.clone().unwrap_or_default()]
    }
}

#[cfg(test)]
mod tests {
    use insta::assert_snapshot;

    use super::*;

    #[test]
    fn an_account_is_invited_active_or_revoked() {
        let account = |name: &str, certificate_expires_at, revoked| v1::AdminAccount {
            name: name.to_owned(),
            certificate_expires_at,
            revoked,
        };
        let accounts = [account("alice", 1_800_000_000, false), account("bob", 0, false), account("carol", 0, true)];
        let rows: Vec<AdminRow> = accounts.into_iter().map(AdminRow::from).collect();
        assert_snapshot!(output::table(AdminRow::HEADINGS, rows.iter().map(Row::cells)), @r"
        NAME   STATE    CERTIFICATE EXPIRES
        alice  active   2027-01-15T08:00:00Z
        bob    invited  -
        carol  revoked  -
        ");
        assert_snapshot!("admin-json", output::json(&rows));
    }
}
