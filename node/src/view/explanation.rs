//! What the kernel, the compiled policy and the interpreter say of one flow.

use ebpf_common::{EGRESS, INGRESS, reason};
use policy::{Action, Flow, Slice, Verdict};

use super::status::unanswered;
use super::{Answer, Direction, Explanation, Interpreted, KernelAnswer, Question, Unanswered};
use crate::enforce::Enforcer;
use crate::kernel::inspect::Probed;

/// `nodectl policy explain`, without the interpreter's part.
pub fn explain(enforcer: &mut Enforcer, question: Question) -> Result<Explanation, Unanswered> {
    let Question { source, destination, protocol, port } = question;
    let flow = Flow { source, destination, protocol, port };
    let Some(intent) = &enforcer.intent else {
        return Err(Unanswered::NoPolicy);
    };
    let slice = intent.slice.clone();
    let directions: Vec<u32> = [(EGRESS, source), (INGRESS, destination)]
        .into_iter()
        .filter(|(_, own)| slice.stands_for(*own))
        .map(|(direction, _)| direction)
        .collect();
    if directions.is_empty() {
        return Err(Unanswered::Elsewhere { opener: source, answerer: destination });
    }
    let mut kernel = Vec::new();
    for direction in directions {
        let probed = enforcer.datapath.probe(&flow, direction).map_err(unanswered)?;
        kernel.push(KernelAnswer {
            direction: Direction::of(direction),
            answer: kernel_answer(enforcer, &slice, probed),
        });
    }
    let cidr = |address| slice.lookup(address).and_then(|(_, cidr)| slice.cidrs.get(&cidr)).map(ToString::to_string);
    let service = flow.to_string();
    Ok(Explanation {
        source,
        destination,
        service: service.rsplit(' ').next().unwrap_or_default().to_owned(),
        source_cidr: cidr(source),
        destination_cidr: cidr(destination),
        allowed: kernel.iter().all(|kernel| kernel.answer.allowed),
        kernel,
        compiled: Some(policy_answer(&slice.verdict(&flow), &slice)),
        interpreted: Interpreted::default(),
        revision: slice.revision.0,
        agree: false,
    })
}

fn kernel_answer(enforcer: &Enforcer, slice: &Slice, probed: Probed) -> Answer {
    let rule = probed.rule.map(|slot| {
        let rule = enforcer.slots.rule(slot).and_then(|rule| slice.rules.get(&rule));
        rule.map_or_else(|| format!("rule in slot {slot}"), |rule| rule.name.to_string())
    });
    Answer { allowed: probed.passes, reason: reason::name(probed.reason).to_owned(), rule }
}

/// A verdict in the kernel's words.
pub fn policy_answer(verdict: &Verdict, slice: &Slice) -> Answer {
    let rule =
        verdict.rule.map(|id| slice.rules.get(&id).map_or_else(|| format!("rule {id}"), |rule| rule.name.to_string()));
    answer(verdict, rule)
}

/// A verdict whose rule has been named elsewhere.
pub fn answer(verdict: &Verdict, rule: Option<String>) -> Answer {
    let reason = match (verdict.action, verdict.reason) {
        (Action::Deny, policy::Reason::Rule) => reason::name(reason::DENY_RULE).to_owned(),
        (_, reason) => reason.to_string(),
    };
    Answer { allowed: verdict.is_allowed(), reason, rule }
}

/// Whether all who answered say the same. The interpreter speaks for the network's newest revision, which is this node's
/// policy too, unless a change that concerns this node is on its way; an older one says nothing of it.
pub fn agree(explanation: &Explanation) -> bool {
    let Explanation { kernel, compiled, interpreted, revision, .. } = explanation;
    let interpreted = interpreted.answer.as_ref().filter(|_| interpreted.revision >= Some(*revision));
    let policy: Vec<&Answer> = compiled.iter().chain(interpreted).collect();
    let same = policy.windows(2).all(|pair| pair[0] == pair[1]);
    same && kernel.iter().all(|kernel| policy.iter().all(|policy| kernel_agrees(&kernel.answer, policy)))
}

/// The kernel also drops what the policy is never asked about: there it is enough that nothing passes.
fn kernel_agrees(kernel: &Answer, policy: &Answer) -> bool {
    let own_reasons = [reason::name(reason::SCOPE), reason::name(reason::MALFORMED), reason::name(reason::NOT_LOCAL)];
    kernel == policy || own_reasons.contains(&kernel.reason.as_str()) && !kernel.allowed
}
