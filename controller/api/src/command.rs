//! A change in words: the command that asks for it.

use std::fmt::Display;

use policy::{Action, Change, RuleSpec};

/// The change, in one line: what `meshctl` would be asked, except for `node join` and `node seen`, which no admin asks for.
pub fn describe(change: &Change) -> String {
    match change {
        Change::SetDefault(default) => format!("policy default {default}"),
        Change::AddCidr { name, prefixes, isolated, external } => {
            let line = format!("cidr add {name} {}", list(prefixes.iter(), " "));
            line + flag(" --isolated", *isolated) + flag(" --external", *external)
        }
        Change::RenameCidr { from, to } => format!("cidr rename {from} {to}"),
        Change::MoveCidr { name, prefixes } => format!("cidr move {name} {}", list(prefixes.iter(), " ")),
        Change::SetCidr { name, isolated } => format!("cidr set {name} --isolated {isolated}"),
        Change::DeleteCidr { name } => format!("cidr delete {name}"),
        Change::AddNode { name, cidr, addresses, groups, gateway_for } => {
            let mut line = format!("node invite {name} --cidr {cidr}");
            line += &options("--address", addresses.iter().flat_map(|addresses| addresses.iter()));
            line += &options("--group", groups);
            line + &options("--gateway-for", gateway_for)
        }
        Change::ActivateNode { name, public_key } => format!("node join {name} {public_key}"),
        Change::RenameNode { from, to } => format!("node rename {from} {to}"),
        Change::DisableNode { name } => format!("node disable {name}"),
        Change::EnableNode { name } => format!("node enable {name}"),
        Change::DeleteNode { name } => format!("node delete {name}"),
        Change::SetEndpoint { name, endpoint: None } => format!("node endpoint {name} --observed"),
        Change::SetEndpoint { name, endpoint: Some(endpoint) } => format!("node endpoint {name} {endpoint}"),
        Change::AddGroup { name, members } => format!("group add {name}{}", options("--member", members)),
        Change::RenameGroup { from, to } => format!("group rename {from} {to}"),
        Change::DeleteGroup { name } => format!("group delete {name}"),
        Change::AddMember { group, member } => format!("group member add {group} {member}"),
        Change::RemoveMember { group, member } => format!("group member remove {group} {member}"),
        Change::AddRule(rule) => describe_rule(rule),
        Change::DeleteRule { name } => format!("rule delete {name}"),
        Change::AddService { name, services } => format!("service add {name} {}", list(services, " ")),
        Change::DeleteService { name } => format!("service delete {name}"),
    }
}

fn describe_rule(rule: &RuleSpec) -> String {
    let RuleSpec { name, action, from, to, services, priority, both, log, comment } = rule;
    let mut line = format!("rule add {name}") + flag(" --deny", *action == Action::Deny);
    line += &options("--from", from);
    line += &options("--to", to);
    line += &options("--service", services);
    if *priority != 0 {
        line += &format!(" --priority {priority}");
    }
    line = line + flag(" --both", *both) + flag(" --log", *log);
    if !comment.is_empty() {
        line += &format!(" --comment {comment:?}");
    }
    line
}

fn flag(option: &'static str, set: bool) -> &'static str {
    if set { option } else { "" }
}

fn list<T: Display>(items: impl IntoIterator<Item = T>, separator: &str) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(separator)
}

fn options<T: Display>(name: &str, items: impl IntoIterator<Item = T>) -> String {
    items.into_iter().map(|item| format!(" {name} {item}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_read_as_the_commands_that_ask_for_them() {
        let rule = RuleSpec {
            name: "web-to-app".parse().expect("a name"),
            action: Action::Allow,
            from: vec!["cidr:web".parse().expect("a selector")],
            to: vec!["cidr:app".parse().expect("a selector"), "node:db1".parse().expect("a selector")],
            services: vec!["tcp/8080".parse().expect("a service")],
            priority: -5,
            both: true,
            log: false,
            comment: "say \"hello\"\n".to_owned(),
        };
        assert_eq!(
            describe(&Change::AddRule(rule)),
            "rule add web-to-app --from cidr:web --to cidr:app --to node:db1 --service tcp/8080 \
             --priority -5 --both --comment \"say \\\"hello\\\"\\n\""
        );
        let name: policy::NodeName = "web1".parse().expect("a name");
        let address = "192.0.2.1:51820".parse().expect("an address");
        let endpoint = Some(address);
        assert_eq!(
            describe(&Change::SetEndpoint { name: name.clone(), endpoint }),
            "node endpoint web1 192.0.2.1:51820"
        );
        assert_eq!(describe(&Change::SetEndpoint { name, endpoint: None }), "node endpoint web1 --observed");
    }
}
