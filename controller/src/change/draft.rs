//! What the state would become by what is asked. Pure: the writer makes it so.

use controller_api::command::describe;
use controller_api::identity::Identity;
use controller_api::invitation::Subject;
use controller_api::nearest::nearest;
use policy::{Change, Network, NodeId, Rows};

use super::audit::Actor;
use super::enrol::{self, RedeemError};
use super::request::{CHANGES_MAX, Outcome, Refusal, Request, position};
use crate::state::State;
use crate::store::account::{AccountRows, Accounts, Admin, Invitee, KeyHash, Keys, SecretHash};
use crate::store::{AuditLine, Op, rows};

/// A next state in the making.
#[derive(Clone, Debug)]
pub struct Draft {
    pub network: Network,
    pub accounts: Accounts,
    pub audit: Vec<AuditLine>,
}

/// What a draft changes.
#[derive(Clone, Debug, Default)]
pub struct Touched {
    pub policy: Rows,
    pub accounts: AccountRows,
}

impl Draft {
    pub fn of(state: &State) -> Self {
        let (mut network, mut accounts) = (state.network().clone(), Accounts::clone(&state.accounts));
        network.take_touched();
        accounts.take_touched();
        Self { network, accounts, audit: Vec::new() }
    }

    /// What was touched since the last call, and the rows that it becomes in the store.
    pub fn take_ops(&mut self) -> (Touched, Vec<Op>) {
        let touched = Touched { policy: self.network.take_touched(), accounts: self.accounts.take_touched() };
        let mut ops = rows::of_policy(&self.network, &touched.policy);
        ops.extend(rows::of_accounts(&self.accounts, &touched.accounts));
        (touched, ops)
    }

    /// Does what is asked to the draft; on an error the draft is as it was. `now`: seconds since the epoch.
    pub fn apply(&mut self, actor: &Actor, request: &Request, now: u64) -> Result<Outcome, Refusal> {
        let before = self.clone();
        let applied = self.try_apply(actor, request, now);
        if applied.is_err() {
            *self = before;
        }
        applied
    }

    fn try_apply(&mut self, actor: &Actor, request: &Request, now: u64) -> Result<Outcome, Refusal> {
        let outcome = match request {
            Request::Change(changes) => return self.change(actor, changes),
            Request::Invite { subject, hash, expires_at } => {
                enrol::invite(&self.network, &mut self.accounts, subject, *hash, *expires_at, now)?;
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
            Request::RevokeAdmin(name) => self.revoke(actor, name)?,
            Request::RenewAdmin { name, requested, certificate_expires_at } => {
                let identity = Identity::Admin(name.clone());
                if !self.accounts.accepts(&identity, requested) {
                    return Err(Refusal::NoAdminKey { name: name.clone() });
                }
                enrol::renew_admin(&mut self.accounts, &identity, *certificate_expires_at);
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
        let mut warnings = Vec::new();
        for (index, change) in changes.iter().enumerate() {
            let refusal = |reason| Refusal::Change { index, count, reason: Box::new(reason) };
            let deleted = match change {
                Change::DeleteNode { name } => self.network.node_named(name).map(|node| node.id),
                _ => None,
            };
            let said = self.network.apply(change).map_err(refusal)?;
            warnings.extend(said.iter().map(|warning| format!("{}{warning}", position(index, count))));
            deleted.into_iter().for_each(|node| self.forget(node));
        }
        self.audit
            .extend(changes.iter().map(|change| AuditLine { actor: actor.to_string(), change: describe(change) }));
        Ok(Outcome { changed: true, warnings, ..Outcome::default() })
    }

    /// What was known of a node that is gone.
    fn forget(&mut self, node: NodeId) {
        if self.accounts.credentials().contains_key(&node) {
            self.accounts.put_credential(node, None);
        }
        for hash in self.accounts.invitations_of(&Invitee::Node(node)) {
            self.accounts.put_invitation(hash, None);
        }
    }

    fn redeem(&mut self, hash: SecretHash, keys: &Keys, expires_at: u64, now: u64) -> Result<Outcome, Refusal> {
        let (redeemed, changed) = enrol::redeem(&mut self.network, &mut self.accounts, hash, keys, expires_at, now)?;
        if changed {
            let (actor, change) = match (&redeemed.identity, keys.wireguard) {
                (Identity::Node(_), Some(public_key)) => {
                    // The name comes from the network, so it parses.
                    let name = redeemed
                        .name
                        .parse()
                        .map_err(|_| RedeemError::Unknown { network: self.network.name().to_string() })?;
                    let change = Change::ActivateNode { name, public_key };
                    (format!("node:{}", redeemed.name), describe(&change))
                }
                _ => (format!("admin:{}", redeemed.name), format!("admin join {}", redeemed.name)),
            };
            self.audit.push(AuditLine { actor, change });
        }
        Ok(Outcome { changed, redeemed: Some(redeemed), ..Outcome::default() })
    }

    fn rekey(&mut self, actor: &Actor, node: NodeId, shown: KeyHash, requested: KeyHash) -> Result<Outcome, Refusal> {
        if !self.accounts.accepts(&Identity::Node(node), &shown) {
            return Err(Refusal::NoKey { node });
        }
        let mut credential = self.accounts.credentials().get(&node).cloned().unwrap_or_default();
        if !enrol::rekey(&mut credential, shown, requested) {
            return Ok(Outcome::default());
        }
        self.accounts.put_credential(node, Some(credential));
        Ok(self.done(actor, "node renew".to_owned()))
    }

    fn revoke(&mut self, actor: &Actor, name: &str) -> Result<Outcome, Refusal> {
        let invited = self.accounts.invitations_of(&Invitee::Admin(name.to_owned()));
        let admin = self.accounts.admins().get(name).cloned();
        if admin.is_none() && invited.is_empty() {
            let hint = nearest(name, self.accounts.admins().keys().map(String::as_str));
            let hint = hint.map(|near| format!(" (did you mean `{near}`?)")).unwrap_or_default();
            return Err(Refusal::UnknownAdmin { name: name.to_owned(), hint });
        }
        for hash in invited {
            self.accounts.put_invitation(hash, None);
        }
        if let Some(admin) = admin {
            self.accounts.put_admin(name.to_owned(), Some(Admin { revoked: true, ..admin }));
        }
        Ok(self.done(actor, format!("admin revoke {name}")))
    }
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
        let before = (draft.network.clone(), draft.accounts.clone(), draft.audit.len());
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
        assert!(outcome.changed && !draft.network.clone().take_touched().nodes.is_empty());
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
        assert!(draft.accounts.invitations().is_empty() && draft.accounts.credentials().len() == 3);
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
        assert_eq!(draft.accounts.admins()["alice"].certificate_expires_at, NOW + 999);
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
                .invitations()
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
        assert!(draft.audit.is_empty() && draft.take_ops().1.is_empty());
        let none = draft.apply(&Actor::Root, &Request::Change(Vec::new()), NOW).expect_err("refused");
        assert!(matches!(none, Refusal::Count { found: 0 }));
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
