//! Edges and other values that are not plain parameters.
//!
//! In JSON, an edge is `{"$input": {…}}`, a gather `{"$gather": {…}}`, a file `{"$file": {…}}`
//! and text with edges in it `{"$text": […]}`. [`key_form`] strips what must not be in a key.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::path::PathBuf;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

use crate::artifact::{Artifact, Type};
use crate::digest::Digest;

/// What an edge is bound to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Binding {
    /// Type of what flows along it.
    #[serde(rename = "type")]
    pub ty: Type,
    /// Index into the instance's list of edges. Not part of the key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub edge: Option<usize>,
    /// Port names, where the plan knows them. Not part of the key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub names: Option<Vec<String>>,
    /// Tree digest by port, once the upstream step has its result.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ports: Option<BTreeMap<String, Digest>>,
    /// What the upstream record says, for kinds that read records.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub facts: Option<Map<String, Value>>,
}

impl Binding {
    /// Keeps only these ports.
    pub fn keep(&mut self, ports: &[&str]) {
        if let Some(bound) = &mut self.ports {
            bound.retain(|name, _| ports.contains(&name.as_str()));
        }
        if let Some(names) = &mut self.names {
            names.retain(|name| ports.contains(&name.as_str()));
        }
    }

    /// Port names that are known now: bound ones, else those the plan knows.
    pub fn known_ports(&self) -> Option<Vec<String>> {
        let bound = self.ports.as_ref().map(|p| p.keys().cloned().collect());
        bound.or_else(|| self.names.clone())
    }

    fn narrow_to<A: Artifact>(&mut self) -> Result<(), String> {
        if !A::ACCEPTS.contains(&self.ty) {
            let want: Vec<String> = A::ACCEPTS.iter().map(|t| format!("`{t}`")).collect();
            return Err(format!("expected {}, found `{}`", want.join(" or "), self.ty));
        }
        if let Some(ports) = A::PORTS {
            self.keep(ports);
        }
        Ok(())
    }
}

/// An edge: in the pipeline a reference (`${steps.name}` or `${steps.name.port}`), in the key the
/// digests of what flows along it.
#[derive(Debug)]
pub struct Input<A> {
    /// What it is bound to.
    pub binding: Binding,
    artifact: PhantomData<fn() -> A>,
}

impl<A> Clone for Input<A> {
    fn clone(&self) -> Self {
        Self { binding: self.binding.clone(), artifact: PhantomData }
    }
}

impl<A> Input<A> {
    /// Type of what flows along it.
    pub fn ty(&self) -> Type {
        self.binding.ty
    }

    /// Keeps only these ports.
    pub fn keep(&mut self, ports: &[&str]) {
        self.binding.keep(ports);
    }

    /// Port names that are known now.
    pub fn names(&self) -> Option<Vec<String>> {
        self.binding.known_ports()
    }
}

fn unwrap<T: serde::de::DeserializeOwned, E: serde::de::Error>(
    value: Value,
    tag: &str,
    what: &str,
) -> Result<T, E> {
    if let Value::Object(mut map) = value {
        if let Some(inner) = map.remove(tag) {
            return serde_json::from_value(inner).map_err(E::custom);
        }
        return Err(E::custom(format!("expected {what}, found a map")));
    }
    Err(E::custom(format!("expected {what}, found `{value}`")))
}

const REFERENCE: &str = "a reference to a step like `${steps.name}`";
const GATHER: &str = "a gather over a sweep like `${steps.name.*}`";

impl<'de, A: Artifact> Deserialize<'de> for Input<A> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(d)?;
        let mut binding: Binding = unwrap(value, "$input", REFERENCE)?;
        binding.narrow_to::<A>().map_err(D::Error::custom)?;
        Ok(Self { binding, artifact: PhantomData })
    }
}

impl<A> Serialize for Input<A> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        BTreeMap::from([("$input", &self.binding)]).serialize(s)
    }
}

fn reference_schema(accepts: &[Type], gather: bool) -> Schema {
    let types: Vec<String> = accepts.iter().map(|t| format!("`{t}`")).collect();
    let types = types.join(" or ");
    let (form, pattern) = if gather {
        ("${steps.name.*}", r"^\$\{steps\.[^}]+\.\*\}$")
    } else {
        ("${steps.name}", r"^\$\{[^}]+\}$")
    };
    json_schema!({
        "type": "string",
        "description": format!("Reference `{form}` to a step that yields {types}."),
        "pattern": pattern,
        // for `flow kinds`: a field's own description takes the place of this one
        "x-yields": accepts.iter().map(|t| t.name()).collect::<Vec<_>>(),
    })
}

impl<A: Artifact> JsonSchema for Input<A> {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> Cow<'static, str> {
        "Input".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        reference_schema(A::ACCEPTS, false)
    }
}

/// One member of a gather: the sweep coordinates of a point, and the edge to it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    /// Coordinate by axis (`lora.r` for members of a named zip).
    pub point: BTreeMap<String, Value>,
    /// The edge.
    pub input: Binding,
}

/// All points of a step: `${steps.name.*}`; members sorted by coordinates.
#[derive(Debug)]
pub struct Gather<A> {
    /// The members.
    pub members: Vec<Member>,
    artifact: PhantomData<fn() -> A>,
}

impl<A> Clone for Gather<A> {
    fn clone(&self) -> Self {
        Self { members: self.members.clone(), artifact: PhantomData }
    }
}

impl<A> Gather<A> {
    /// Type of the members, if there are any.
    pub fn ty(&self) -> Option<Type> {
        self.members.first().map(|m| m.input.ty)
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Members {
    members: Vec<Member>,
}

impl<'de, A: Artifact> Deserialize<'de> for Gather<A> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let Members { mut members } = unwrap(Value::deserialize(d)?, "$gather", GATHER)?;
        for member in &mut members {
            member.input.narrow_to::<A>().map_err(D::Error::custom)?;
        }
        Ok(Self { members, artifact: PhantomData })
    }
}

impl<A> Serialize for Gather<A> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let members = Members { members: self.members.clone() };
        BTreeMap::from([("$gather", members)]).serialize(s)
    }
}

impl<A: Artifact> JsonSchema for Gather<A> {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> Cow<'static, str> {
        "Gather".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        reference_schema(A::ACCEPTS, true)
    }
}

/// A local file or directory, written as a path relative to the pipeline file. Its content digest
/// is in the key, its path never is. `Outside::file` fills in both.
#[derive(Debug, Clone, PartialEq)]
pub struct FileInput {
    /// As written, then absolute. Not part of the key.
    pub path: PathBuf,
    /// Tree digest of the content, once resolved.
    pub digest: Option<Digest>,
}

impl<'de> Deserialize<'de> for FileInput {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Resolved {
            path: PathBuf,
            digest: Option<Digest>,
        }
        let value = Value::deserialize(d)?;
        if let Value::String(path) = value {
            return Ok(Self { path: path.into(), digest: None });
        }
        let Resolved { path, digest } = unwrap(value, "$file", "a path")?;
        Ok(Self { path, digest })
    }
}

impl Serialize for FileInput {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let inner = serde_json::json!({ "path": self.path, "digest": self.digest });
        BTreeMap::from([("$file", inner)]).serialize(s)
    }
}

impl JsonSchema for FileInput {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> Cow<'static, str> {
        "FileInput".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "description": "Path of a local file or directory, relative to the pipeline file."
        })
    }
}

/// Text in which references to steps are edges (the `run:` of a `command`).
#[derive(Debug, Clone, PartialEq)]
pub struct Text {
    /// Plain pieces and edges, in order.
    pub pieces: Vec<TextPiece>,
}

/// A piece of a [`Text`].
#[derive(Debug, Clone, PartialEq)]
pub enum TextPiece {
    /// Plain text.
    Plain(String),
    /// An edge, which the process sees as a read-only path.
    Edge(Binding),
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(d)?;
        if let Value::String(text) = value {
            return Ok(Self { pieces: vec![TextPiece::Plain(text)] });
        }
        let raw: Vec<Value> = unwrap(value, "$text", "text")?;
        let pieces = raw.into_iter().map(|piece| match piece {
            Value::String(text) => Ok(TextPiece::Plain(text)),
            edge => unwrap(edge, "$input", REFERENCE).map(TextPiece::Edge),
        });
        Ok(Self { pieces: pieces.collect::<Result<_, D::Error>>()? })
    }
}

impl Serialize for Text {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let pieces = self.pieces.iter().map(|piece| match piece {
            TextPiece::Plain(text) => Value::String(text.clone()),
            TextPiece::Edge(binding) => serde_json::json!({ "$input": binding }),
        });
        BTreeMap::from([("$text", pieces.collect::<Vec<_>>())]).serialize(s)
    }
}

impl JsonSchema for Text {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> Cow<'static, str> {
        "Text".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "description": "Text; `${steps.name}` in it is an edge."
        })
    }
}

/// Parameters as they enter the key: paths of files, plan-time port names and edge numbers gone.
pub fn key_form(params: &Value) -> Value {
    match params {
        Value::Array(items) => Value::Array(items.iter().map(key_form).collect()),
        Value::Object(map) => {
            if let (1, Some(Value::Object(inner))) = (map.len(), map.get("$input")) {
                return serde_json::json!({ "$input": without(inner, &["edge", "names"]) });
            }
            if let (1, Some(Value::Object(inner))) = (map.len(), map.get("$file")) {
                return serde_json::json!({ "$file": without(inner, &["path"]) });
            }
            if let (1, Some(Value::Object(gather))) = (map.len(), map.get("$gather")) {
                let members = gather["members"].as_array().into_iter().flatten().map(|m| {
                    let input = m["input"].as_object().cloned().unwrap_or_default();
                    let input = without(&input, &["edge", "names"]);
                    serde_json::json!({ "point": m["point"], "input": input })
                });
                return serde_json::json!({ "$gather": members.collect::<Vec<_>>() });
            }
            Value::Object(map.iter().map(|(k, v)| (k.clone(), key_form(v))).collect())
        }
        plain => plain.clone(),
    }
}

fn without(map: &Map<String, Value>, names: &[&str]) -> Map<String, Value> {
    let kept = map.iter().filter(|(k, _)| !names.contains(&k.as_str()));
    kept.map(|(k, v)| (k.clone(), v.clone())).collect()
}
