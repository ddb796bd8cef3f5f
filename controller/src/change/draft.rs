//! What the state would become by what is asked. Pure: the writer makes it so.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use controller_api::command::describe;
use controller_api::identity::Identity;
use controller_api::invitation::Subject;
use controller_api::nearest::nearest;
use policy::{Change, Endpoint, Network, NodeId};

use super::audit::Actor;
use super::enrol::{self, RedeemError};
use super::request::{CHANGES_MAX, Outcome, Refusal, Request, position};
use crate::state::State;
use crate::store::AuditLine;
use crate::store::account::{Accounts, Invitation, Invitee, KeyHash, Keys, SecretHash};

/// A next state in the making.
#[derive(Debug)]
pub struct Draft {
    pub network: Arc<Network>,
    pub accounts: Arc<Accounts>,
    /// Something changed that the matrix is made of.
    pub recompile: bool,
    pub audit: Vec<AuditLine>,
}

impl Draft {
    pub fn of(state: &State) -> Self {
        Self {
            network: Arc::clone(&state.network),
            accounts: Arc::clone(&state.accounts),
            recompile: false,
            audit: Vec::new(),
        }
    }

    /// Does what is asked to the draft; on an error the draft is as it was. `now`: seconds since the epoch.
    pub fn apply(&mut self, actor: &Actor, request: &Request, now: u64) -> Result<Outcome, Refusal> {
        let outcome = match request {
            Request::Start => self.done(actor, "controller start".to_owned()),
            Request::Change(changes) => return self.change(actor, changes),
            Request::Invite { subject, hash, expires_at } => {
                let accounts = Arc::make_mut(&mut self.accounts);
                enrol::invite(&self.network, accounts, subject, *hash, *expires_at, now)?;
                let (kind, name) = match subject {
                    Subject::Node(name) => ("node", name.to_string()),
                    Subject::Admin(name) => ("admin", name.clone()),
                };
                self.done(actor, format!("{kind} invite {name} --expires {}s", expires_at.saturating_sub(now)))
            }
            Request::Redeem { hash, keys, certificate_expires_at } => {
                return self.redeem(*hash, keys, *certificate_expires_at, now);
            }
            Request::Rekey { node, shown, requested } => self.rekey(actor, *node, *shown, *requested)?,
            Request::Observe { node, address } => self.observe(actor, *node, *address)?,
            Request::RevokeAdmin(name) => self.revoke(actor, name)?,
            Request::RenewAdmin { name, requested, certificate_expires_at } => {
                let identity = Identity::Admin(name.clone());
                if !self.accounts.accepts(&identity, requested) {
                    return Err(Refusal::NoAdminKey { name: name.clone() });
                }
                enrol::renew_admin(Arc::make_mut(&mut self.accounts), &identity, *certificate_expires_at);
                self.done(actor, format!("admin renew {name}"))
            }
            Request::Leave(node) => {
                let name = self.network.nodes().get(node).ok_or(Refusal::NoNode { node: *node })?.name.clone();
                return self.change(actor, &[Change::DeleteNode { name }]);
            }
        };
        Ok(outcome)
    }

    fn done(&mut self, actor: &Actor, change: String) -> Outcome {
        self.audit.push(AuditLine { actor: actor.to_string(), change });
        Outcome { changed: true, ..Outcome::default() }
    }

    fn change(&mut self, actor: &Actor, changes: &[Change]) -> Result<Outcome, Refusal> {
        let count = changes.len();
        if count == 0 || count > CHANGES_MAX {
            return Err(Refusal::Count { found: count });
        }
        let mut network = Network::clone(&self.network);
        let mut warnings = Vec::new();
        for (index, change) in changes.iter().enumerate() {
            let refusal = |reason| Refusal::Change { index, count, reason: Box::new(reason) };
            let said = network.apply(change).map_err(refusal)?;
            warnings.extend(said.iter().map(|warning| format!("{}{warning}", position(index, count))));
        }
        self.recompile |= changes.iter().any(|change| !matches!(change, Change::SetEndpoint { .. }));
        self.audit
            .extend(changes.iter().map(|change| AuditLine { actor: actor.to_string(), change: describe(change) }));
        self.network = Arc::new(network);
        self.forget_deleted();
        Ok(Outcome { changed: true, warnings, ..Outcome::default() })
    }

    /// What was known of nodes that are gone.
    fn forget_deleted(&mut self) {
        let nodes = self.network.nodes();
        let gone = |node: &NodeId| !nodes.contains_key(node);
        let orphaned = |invitation: &Invitation| match &invitation.invitee {
            Invitee::Node(node) => gone(node),
            Invitee::Admin(_) => false,
        };
        if self.accounts.credentials.keys().any(gone) || self.accounts.invitations.values().any(orphaned) {
            let accounts = Arc::make_mut(&mut self.accounts);
            accounts.credentials.retain(|node, _| !gone(node));
            accounts.invitations.retain(|_, invitation| !orphaned(invitation));
        }
    }

    fn redeem(&mut self, hash: SecretHash, keys: &Keys, expires_at: u64, now: u64) -> Result<Outcome, Refusal> {
        let (mut network, mut accounts) = (Network::clone(&self.network), Accounts::clone(&self.accounts));
        let (redeemed, changed) = enrol::redeem(&mut network, &mut accounts, hash, keys, expires_at, now)?;
        if changed {
            let (actor, change) = match (&redeemed.identity, keys.wireguard) {
                (Identity::Node(_), Some(public_key)) => {
                    // The name comes from the network, so it parses.
                    let name = redeemed
                        .name
                        .parse()
                        .map_err(|_| RedeemError::Unknown { network: network.name().to_string() })?;
                    let change = Change::ActivateNode { name, public_key };
                    (format!("node:{}", redeemed.name), describe(&change))
                }
                _ => (format!("admin:{}", redeemed.name), format!("admin join {}", redeemed.name)),
            };
            self.recompile |= matches!(redeemed.identity, Identity::Node(_));
            self.audit.push(AuditLine { actor, change });
            self.network = Arc::new(network);
            self.accounts = Arc::new(accounts);
        }
        Ok(Outcome { changed, redeemed: Some(redeemed), ..Outcome::default() })
    }

    fn rekey(&mut self, actor: &Actor, node: NodeId, shown: KeyHash, requested: KeyHash) -> Result<Outcome, Refusal> {
        if !self.accounts.accepts(&Identity::Node(node), &shown) {
            return Err(Refusal::NoKey { node });
        }
        let mut credential = self.accounts.credentials.get(&node).cloned().unwrap_or_default();
        if !enrol::rekey(&mut credential, shown, requested) {
            return Ok(Outcome::default());
        }
        Arc::make_mut(&mut self.accounts).credentials.insert(node, credential);
        Ok(self.done(actor, "node renew".to_owned()))
    }

    /// An endpoint that an operator fixed stays, and so does one that did not change.
    fn observe(&mut self, actor: &Actor, node: NodeId, address: SocketAddr) -> Result<Outcome, Refusal> {
        let known = self.network.nodes().get(&node).ok_or(Refusal::NoNode { node })?;
        let endpoint = Endpoint { address, fixed: false };
        if !is_useful(&self.network, address) || known.endpoint.is_some_and(|old| old.fixed || old == endpoint) {
            return Ok(Outcome::default());
        }
        let change = Change::SetEndpoint { name: known.name.clone(), endpoint: Some(endpoint) };
        let refusal = |reason| Refusal::Change { index: 0, count: 1, reason: Box::new(reason) };
        Arc::make_mut(&mut self.network).apply(&change).map_err(refusal)?;
        Ok(self.done(actor, describe(&change)))
    }

    fn revoke(&mut self, actor: &Actor, name: &str) -> Result<Outcome, Refusal> {
        let invitee = Invitee::Admin(name.to_owned());
        let invited = self.accounts.invitations.values().any(|invitation| invitation.invitee == invitee);
        if !self.accounts.admins.contains_key(name) && !invited {
            let hint = nearest(name, self.accounts.admins.keys().map(String::as_str));
            let hint = hint.map(|near| format!(" (did you mean `{near}`?)")).unwrap_or_default();
            return Err(Refusal::UnknownAdmin { name: name.to_owned(), hint });
        }
        let accounts = Arc::make_mut(&mut self.accounts);
        accounts.invitations.retain(|_, invitation| invitation.invitee != invitee);
        if let Some(admin) = accounts.admins.get_mut(name) {
            admin.revoked = true;
        }
        Ok(self.done(actor, format!("admin revoke {name}")))
    }
}

/// Whether others can reach a node there: not this machine's own loopback, and not through the mesh itself.
fn is_useful(network: &Network, address: SocketAddr) -> bool {
    let ip = address.ip();
    let link_local = match ip {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    address.port() != 0
        && !ip.is_loopback()
        && !ip.is_unspecified()
        && !ip.is_multicast()
        && !link_local
        && !network.roots().contains(ip)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::enrol::Redeemed;
    use crate::fixture::{NOW, add_node, apply, id, key_hash, network, parse, public_key, state};
    use crate::store::account::{Invitee, KeyHash};
    use policy::NodeState;

    const SECRET: SecretHash = SecretHash([1; 32]);
    const EXPIRES: u64 = NOW + 3_600;

    /// A network with `web2` invited.
    fn invited() -> Draft {
        let mut network = network();
        apply(&mut network, &add_node("web2", "web"));
        let mut draft = Draft::of(&state(1, &network));
        invite(&mut draft, Subject::Node(parse("web2")), SECRET);
        draft
    }

    fn invite(draft: &mut Draft, subject: Subject, hash: SecretHash) {
        let request = Request::Invite { subject, hash, expires_at: EXPIRES };
        draft.apply(&Actor::Root, &request, NOW).expect("an invitation");
    }

    fn keys(certificate: u8, wireguard: u8) -> Keys {
        Keys { certificate: key_hash(certificate), wireguard: (wireguard != 0).then(|| public_key(wireguard)) }
    }

    fn redeem(draft: &mut Draft, hash: SecretHash, keys: Keys, now: u64) -> Result<Outcome, Refusal> {
        let request = Request::Redeem { hash, keys, certificate_expires_at: now + 100 };
        draft.apply(&Actor::Controller, &request, now)
    }

    /// It is refused with these words, and nothing has changed.
    fn check_refused(draft: &mut Draft, hash: SecretHash, keys: Keys, now: u64, words: &[&str]) {
        let before = (Arc::clone(&draft.network), Arc::clone(&draft.accounts), draft.audit.len());
        let text = redeem(draft, hash, keys, now).expect_err("refused").to_string();
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
        assert_eq!(draft.accounts, before.1);
        assert_eq!(draft.audit.len(), before.2);
        assert_eq!(draft.network.to_parts(), before.0.to_parts());
    }

    #[test]
    fn an_invited_node_becomes_active_with_its_keys() {
        let mut draft = invited();
        let outcome = redeem(&mut draft, SECRET, keys(50, 60), NOW).expect("let in");
        let node = draft.network.node_named(&parse("web2")).expect("a node");
        assert_eq!((node.state, node.public_key), (NodeState::Active, Some(public_key(60))));
        let identity = Identity::Node(node.id);
        assert_eq!(outcome.redeemed, Some(Redeemed { identity: identity.clone(), name: "web2".to_owned() }));
        assert!(draft.accounts.accepts(&identity, &key_hash(50)) && !draft.accounts.accepts(&identity, &key_hash(51)));
        assert!(outcome.changed && draft.recompile);
        let line = draft.audit.last().expect("a line");
        assert_eq!((line.actor.as_str(), line.change.starts_with("node join web2 ")), ("node:web2", true));
    }

    #[test]
    fn the_same_keys_again_are_the_same_node() {
        let mut draft = invited();
        let first = redeem(&mut draft, SECRET, keys(50, 60), NOW).expect("let in");
        for now in [NOW, EXPIRES + 1] {
            let again = redeem(&mut draft, SECRET, keys(50, 60), now).expect("let in again");
            assert_eq!((again.redeemed, again.changed), (first.redeemed.clone(), false));
        }
    }

    #[test]
    fn an_invitation_lets_nobody_else_in() {
        let mut draft = invited();
        check_refused(
            &mut draft,
            SecretHash([2; 32]),
            keys(50, 60),
            NOW,
            &["not known", "another network than `corp`"],
        );
        check_refused(
            &mut draft,
            SECRET,
            keys(50, 60),
            EXPIRES + 5,
            &["`web2` expired 5 s ago", "meshctl node invite web2"],
        );
        check_refused(&mut draft, SECRET, keys(50, 0), NOW, &["WireGuard key is missing", "`web2`"]);
        check_refused(&mut draft, SECRET, keys(50, 1), NOW, &["web1"]);
        redeem(&mut draft, SECRET, keys(50, 60), NOW).expect("let in");
        for other in [keys(51, 60), keys(50, 61)] {
            check_refused(
                &mut draft,
                SECRET,
                other,
                NOW,
                &["`web2` was used already, by other keys", "node disable web2"],
            );
        }
        let disable = Request::Change(vec![Change::DisableNode { name: parse("web2") }]);
        draft.apply(&Actor::Root, &disable, NOW).expect("disabled");
        check_refused(&mut draft, SECRET, keys(50, 60), NOW, &["`web2` is disabled", "enable"]);
        let delete = Request::Change(vec![Change::DeleteNode { name: parse("web2") }]);
        draft.apply(&Actor::Root, &delete, NOW).expect("deleted");
        check_refused(&mut draft, SECRET, keys(50, 60), NOW, &["not known"]);
        assert!(draft.accounts.invitations.is_empty() && draft.accounts.credentials.len() == 3);
    }

    #[test]
    fn a_newer_invitation_replaces_the_older_and_its_keys() {
        let (newer, newest) = (SecretHash([2; 32]), SecretHash([3; 32]));
        let mut draft = invited();
        invite(&mut draft, Subject::Node(parse("web2")), newer);
        check_refused(&mut draft, SECRET, keys(50, 60), NOW, &["not known", "replaced"]);
        redeem(&mut draft, newer, keys(50, 60), NOW).expect("let in");
        // The machine was lost, and is set up again with keys of its own.
        invite(&mut draft, Subject::Node(parse("web2")), newest);
        redeem(&mut draft, newer, keys(50, 60), NOW).expect("still good until the new one is used");
        redeem(&mut draft, newest, keys(52, 62), NOW).expect("let in");
        check_refused(&mut draft, newer, keys(50, 60), NOW, &["not known"]);
        let identity = Identity::Node(id(&draft.network, "web2"));
        assert!(!draft.accounts.accepts(&identity, &key_hash(50)) && draft.accounts.accepts(&identity, &key_hash(52)));
    }

    #[test]
    fn admins_come_and_go() {
        let mut draft = invited();
        let alice = || Subject::Admin("alice".to_owned());
        let identity = Identity::Admin("alice".to_owned());
        let (first, second) = (SecretHash([4; 32]), SecretHash([5; 32]));
        invite(&mut draft, alice(), first);
        check_refused(&mut draft, first, keys(70, 60), NOW, &["WireGuard key is given", "`alice`"]);
        redeem(&mut draft, first, keys(70, 0), NOW).expect("let in");
        assert!(draft.accounts.accepts(&identity, &key_hash(70)));
        let renew = |draft: &mut Draft, key| {
            let request = Request::RenewAdmin {
                name: "alice".to_owned(),
                requested: key_hash(key),
                certificate_expires_at: NOW + 999,
            };
            draft.apply(&Actor::Admin("alice".to_owned()), &request, NOW).map(|outcome| outcome.changed)
        };
        assert!(matches!(renew(&mut draft, 71), Err(Refusal::NoAdminKey { .. })));
        assert!(renew(&mut draft, 70).expect("renewed"));
        assert_eq!(draft.accounts.admins["alice"].certificate_expires_at, NOW + 999);
        draft.apply(&Actor::Root, &Request::RevokeAdmin("alice".to_owned()), NOW).expect("revoked");
        assert!(matches!(renew(&mut draft, 70), Err(Refusal::NoAdminKey { .. })));
        assert!(!draft.accounts.accepts(&identity, &key_hash(70)));
        check_refused(&mut draft, first, keys(70, 0), NOW, &["not known"]);
        let unknown = draft.apply(&Actor::Root, &Request::RevokeAdmin("alcie".to_owned()), NOW).expect_err("unknown");
        assert!(unknown.to_string().contains("did you mean `alice`?"), "{unknown}");
        invite(&mut draft, alice(), second);
        redeem(&mut draft, second, keys(71, 0), NOW).expect("let in again");
        assert!(draft.accounts.accepts(&identity, &key_hash(71)) && !draft.accounts.accepts(&identity, &key_hash(70)));
        assert!(
            draft
                .accounts
                .invitations
                .values()
                .all(|invitation| invitation.invitee != Invitee::Admin("bob".to_owned()))
        );
    }

    #[test]
    fn who_cannot_be_invited_is_named() {
        let mut draft = invited();
        let mut refused = |subject, expires_at, words: &[&str]| {
            let request = Request::Invite { subject, hash: SecretHash([9; 32]), expires_at };
            let text = draft.apply(&Actor::Root, &request, NOW).expect_err("refused").to_string();
            assert!(words.iter().all(|word| text.contains(word)), "{text}");
        };
        refused(Subject::Node(parse("wbe2")), EXPIRES, &["`wbe2`", "did you mean `web2`?"]);
        refused(Subject::Node(parse("web2")), NOW + 31 * 86_400, &["2678400", "30 days"]);
        let disable = Request::Change(vec![Change::DisableNode { name: parse("web1") }]);
        draft.apply(&Actor::Root, &disable, NOW).expect("disabled");
        let request = Request::Invite { subject: Subject::Node(parse("web1")), hash: SECRET, expires_at: EXPIRES };
        let text = draft.apply(&Actor::Root, &request, NOW).expect_err("refused").to_string();
        assert!(text.contains("`web1` is disabled"), "{text}");
    }

    #[test]
    fn changes_are_all_or_none() {
        let mut draft = Draft::of(&state(1, &network()));
        let before = draft.network.to_parts();
        let request = Request::Change(vec![add_node("web2", "web"), add_node("web1", "web")]);
        let text = draft.apply(&Actor::Root, &request, NOW).expect_err("refused").to_string();
        assert!(text.starts_with("change 2 of 2: ") && text.contains("`web1`"), "{text}");
        assert_eq!(draft.network.to_parts(), before);
        assert!(draft.audit.is_empty() && !draft.recompile);
        let none = draft.apply(&Actor::Root, &Request::Change(Vec::new()), NOW).expect_err("refused");
        assert!(matches!(none, Refusal::Count { found: 0 }));
    }

    #[test]
    fn endpoints_are_observed_where_they_help() {
        let network = network();
        let mut draft = Draft::of(&state(1, &network));
        let node = id(&network, "web1");
        let actor = Actor::Node(parse("web1"));
        let mut observe = |address: &str| {
            let request = Request::Observe { node, address: parse(address) };
            draft.apply(&actor, &request, NOW).expect("an answer").changed
        };
        for useless in
            ["127.0.0.1:51820", "[::1]:51820", "0.0.0.0:1", "10.42.9.9:51820", "169.254.0.1:1", "192.0.2.1:0"]
        {
            assert!(!observe(useless), "{useless}");
        }
        assert!(observe("192.0.2.1:51820"));
        assert!(!observe("192.0.2.1:51820"), "nothing new");
        assert!(observe("[2001:db8::1]:51820"));
        assert!(!draft.recompile, "the matrix has no endpoints");
        assert_eq!(draft.audit[0].actor, "node:web1");
        let fixed = Some(Endpoint { address: parse("192.0.2.9:1"), fixed: true });
        let fix = Request::Change(vec![Change::SetEndpoint { name: parse("web1"), endpoint: fixed }]);
        draft.apply(&Actor::Root, &fix, NOW).expect("set");
        let request = Request::Observe { node, address: parse("192.0.2.1:51820") };
        assert!(!draft.apply(&actor, &request, NOW).expect("an answer").changed, "an operator's word stays");
    }

    #[test]
    fn a_node_changes_its_key_without_a_gap() {
        let network = network();
        let mut draft = Draft::of(&state(1, &network));
        let node = id(&network, "web1");
        let identity = Identity::Node(node);
        let old = key_hash(u8::try_from(node.0).expect("small"));
        let new = key_hash(90);
        let mut rekey = |shown: KeyHash, requested: KeyHash| {
            let request = Request::Rekey { node, shown, requested };
            draft.apply(&Actor::Node(parse("web1")), &request, NOW).map(|outcome| outcome.changed)
        };
        assert!(!rekey(old, old).expect("nothing to do"));
        assert!(rekey(old, new).expect("both are good"));
        assert!(rekey(new, new).expect("the old one is not any more"));
        assert!(matches!(rekey(old, key_hash(91)), Err(Refusal::NoKey { .. })));
        assert!(draft.accounts.accepts(&identity, &new) && !draft.accounts.accepts(&identity, &old));
    }
}
