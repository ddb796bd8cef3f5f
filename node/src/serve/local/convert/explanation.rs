//! What is said of one flow.

use super::super::v1;
use super::{ConvertError, address, all, direction, direction_to_wire, narrow, required, wired};
use crate::view::{Answer, Explanation, Interpreted, KernelAnswer, Question};

impl From<Question> for v1::ExplainRequest {
    fn from(Question { source, destination, protocol, port }: Question) -> Self {
        Self {
            source: source.to_string(),
            destination: destination.to_string(),
            protocol: protocol.into(),
            port: port.into(),
        }
    }
}

impl TryFrom<v1::ExplainRequest> for Question {
    type Error = ConvertError;

    fn try_from(question: v1::ExplainRequest) -> Result<Self, Self::Error> {
        let v1::ExplainRequest { source, destination, protocol, port } = question;
        Ok(Self {
            source: address("source", &source)?,
            destination: address("destination", &destination)?,
            protocol: narrow("protocol", protocol)?,
            port: narrow("port", port)?,
        })
    }
}

impl From<Explanation> for v1::ExplainResponse {
    fn from(explanation: Explanation) -> Self {
        let Explanation {
            source,
            destination,
            service,
            source_cidr,
            destination_cidr,
            kernel,
            compiled,
            interpreted,
            revision,
            agree,
            allowed,
        } = explanation;
        Self {
            source: source.to_string(),
            destination: destination.to_string(),
            service,
            source_cidr,
            destination_cidr,
            kernel: wired(kernel),
            compiled: compiled.map(v1::Answer::from),
            interpreted: Some(interpreted.into()),
            revision,
            agree,
            allowed,
        }
    }
}

impl TryFrom<v1::ExplainResponse> for Explanation {
    type Error = ConvertError;

    fn try_from(explanation: v1::ExplainResponse) -> Result<Self, Self::Error> {
        let v1::ExplainResponse {
            source,
            destination,
            service,
            source_cidr,
            destination_cidr,
            kernel,
            compiled,
            interpreted,
            revision,
            agree,
            allowed,
        } = explanation;
        Ok(Self {
            source: address("explanation.source", &source)?,
            destination: address("explanation.destination", &destination)?,
            service,
            source_cidr,
            destination_cidr,
            kernel: all(kernel)?,
            compiled: compiled.map(Answer::from),
            interpreted: required("explanation.interpreted", interpreted)?.into(),
            revision,
            agree,
            allowed,
        })
    }
}

impl From<KernelAnswer> for v1::KernelAnswer {
    fn from(KernelAnswer { direction, answer }: KernelAnswer) -> Self {
        Self { direction: direction_to_wire(direction), answer: Some(answer.into()) }
    }
}

impl TryFrom<v1::KernelAnswer> for KernelAnswer {
    type Error = ConvertError;

    fn try_from(v1::KernelAnswer { direction: at, answer }: v1::KernelAnswer) -> Result<Self, Self::Error> {
        Ok(Self { direction: direction("kernel.direction", at)?, answer: required("kernel.answer", answer)?.into() })
    }
}

impl From<Answer> for v1::Answer {
    fn from(Answer { allowed, reason, rule }: Answer) -> Self {
        Self { allowed, reason, rule }
    }
}

impl From<v1::Answer> for Answer {
    fn from(v1::Answer { allowed, reason, rule }: v1::Answer) -> Self {
        Self { allowed, reason, rule }
    }
}

impl From<Interpreted> for v1::Interpreted {
    fn from(Interpreted { answer, revision, unavailable }: Interpreted) -> Self {
        Self { answer: answer.map(v1::Answer::from), revision, unavailable }
    }
}

impl From<v1::Interpreted> for Interpreted {
    fn from(v1::Interpreted { answer, revision, unavailable }: v1::Interpreted) -> Self {
        Self { answer: answer.map(Answer::from), revision, unavailable }
    }
}
