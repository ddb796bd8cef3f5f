//! The protocol as other versions have it, made from the descriptors of this one.

use controller_api::FILE_DESCRIPTOR_SET;
use prost::Message as _;
use prost::bytes::Bytes;
use prost_reflect::prost_types::field_descriptor_proto::{Label, Type};
use prost_reflect::prost_types::{DescriptorProto, FieldDescriptorProto, FileDescriptorSet};
use prost_reflect::{DescriptorPool, DynamicMessage, ReflectMessage as _, Value};

const PACKAGE: &str = "rampart.v1";
/// What a later version calls what it adds.
const LATER: &str = "later";
const LATER_NUMBER: i32 = 1_000;

/// A later version: each message has a field more, and each oneof a kind more.
#[derive(Clone, Debug)]
pub(crate) struct Newer(DescriptorPool);

impl Newer {
    pub(crate) fn new() -> Self {
        let mut set = FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).expect("descriptors");
        for file in &mut set.file {
            file.message_type.iter_mut().for_each(grow);
            if file.name().ends_with("network.proto") {
                let text = field("text", 1, Type::String);
                file.message_type.push(DescriptorProto {
                    name: Some("Later".to_owned()),
                    field: vec![text],
                    ..DescriptorProto::default()
                });
            } else if !file.dependency.iter().any(|name| name.ends_with("network.proto")) {
                file.dependency.push("rampart/v1/network.proto".to_owned());
            }
        }
        Self(DescriptorPool::from_file_descriptor_set(set).expect("a later version"))
    }

    fn empty(&self, name: &str) -> DynamicMessage {
        DynamicMessage::new(self.0.get_message_by_name(&format!("{PACKAGE}.{name}")).expect(name))
    }

    fn later(&self) -> Value {
        let mut later = self.empty("Later");
        later.set_field_by_name("text", Value::String("what this version does not know".to_owned()));
        Value::Message(later)
    }

    /// A message as the later version writes it: with what is new in it, and in everything within it.
    pub(crate) fn write(&self, name: &str, message: &[u8]) -> Bytes {
        let mut message = DynamicMessage::decode(self.empty(name).descriptor(), message).expect("decodes");
        self.fill(&mut message);
        message.encode_to_vec().into()
    }

    fn fill(&self, message: &mut DynamicMessage) {
        for (_, value) in message.fields_mut() {
            match value {
                Value::Message(within) => self.fill(within),
                Value::List(list) => list.iter_mut().filter_map(Value::as_message_mut).for_each(|one| self.fill(one)),
                _ => {}
            }
        }
        message.set_field_by_name(LATER, self.later());
    }

    /// A message that says only what this version does not know: of another kind, where it has kinds.
    pub(crate) fn strange(&self, name: &str) -> Bytes {
        let mut message = self.empty(name);
        let oneof = message.descriptor().oneofs().next();
        let field = oneof.map_or_else(|| LATER.to_owned(), |oneof| later_kind(oneof.name()));
        message.set_field_by_name(&field, self.later());
        message.encode_to_vec().into()
    }
}

fn later_kind(oneof: &str) -> String {
    format!("{LATER}_{oneof}")
}

fn field(name: &str, number: i32, kind: Type) -> FieldDescriptorProto {
    FieldDescriptorProto {
        name: Some(name.to_owned()),
        number: Some(number),
        label: Some(Label::Optional.into()),
        r#type: Some(kind.into()),
        ..FieldDescriptorProto::default()
    }
}

fn grow(message: &mut DescriptorProto) {
    let later = |name: &str, number| FieldDescriptorProto {
        type_name: Some(format!(".{PACKAGE}.Later")),
        ..field(name, number, Type::Message)
    };
    message.field.push(later(LATER, LATER_NUMBER));
    for (index, number) in (0..message.oneof_decl.len()).zip(LATER_NUMBER + 1..) {
        let name = later_kind(message.oneof_decl[index].name());
        let kind = FieldDescriptorProto { oneof_index: i32::try_from(index).ok(), ..later(&name, number) };
        message.field.push(kind);
    }
    assert!(message.nested_type.is_empty(), "a message within another one would not grow");
}

/// A message as an earlier version writes it, which has not these fields of these messages.
pub(crate) fn without(name: &str, message: &[u8], lacks: &[(&str, &str)]) -> Bytes {
    let pool = DescriptorPool::decode(FILE_DESCRIPTOR_SET).expect("descriptors");
    let descriptor = pool.get_message_by_name(&format!("{PACKAGE}.{name}")).expect(name);
    let mut message = DynamicMessage::decode(descriptor, message).expect("decodes");
    shrink(&mut message, lacks);
    message.encode_to_vec().into()
}

fn shrink(message: &mut DynamicMessage, lacks: &[(&str, &str)]) {
    let name = message.descriptor().name().to_owned();
    for (_, field) in lacks.iter().filter(|(of, _)| *of == name) {
        assert!(message.descriptor().get_field_by_name(field).is_some(), "{name} has no field {field}");
        message.clear_field_by_name(field);
    }
    for (_, value) in message.fields_mut() {
        match value {
            Value::Message(within) => shrink(within, lacks),
            Value::List(list) => list.iter_mut().filter_map(Value::as_message_mut).for_each(|one| shrink(one, lacks)),
            _ => {}
        }
    }
}
