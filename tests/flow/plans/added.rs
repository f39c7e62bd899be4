//! A kind that grows: a field that is added later keeps keys, a default that changes does not.

use flow::artifact::Type;
use flow::step::{Added, Context, Kind, Ports, StepKind};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// The versions of one kind, as it was released and as it was changed.
macro_rules! release {
    ($name:ident, $added:expr, { $($fields:tt)* }) => {
        /// Rows.
        #[derive(Serialize, Deserialize, JsonSchema)]
        #[serde(deny_unknown_fields)]
        struct $name { $($fields)* }

        impl StepKind for $name {
            const NAME: &'static str = "rows";
            const VERSION: u32 = 1;
            const ADDED: &'static [Added] = $added;
            fn ports(&self) -> Ports {
                Ports::named(Type::Files, ["out"])
            }
            fn run(&self, _: &mut Context<'_>) -> anyhow::Result<()> {
                anyhow::bail!("a toy does not run")
            }
        }
    };
}

fn in_order() -> String {
    "file".to_owned()
}
fn shuffled() -> String {
    "random".to_owned()
}
fn nested() -> Inner {
    Inner { bias: false }
}

/// A part of a step.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Inner {
    #[serde(default)]
    bias: bool,
}

const ORDER: Added = Added { field: "order", legacy: "\"file\"" };
const BIAS: Added = Added { field: "inner.bias", legacy: "false" };

release!(First, &[], { rows: u64 });
release!(Careless, &[], {
    rows: u64,
    #[serde(default = "in_order")]
    order: String,
});
release!(Second, &[ORDER], {
    rows: u64,
    #[serde(default = "in_order")]
    order: String,
});
release!(Third, &[ORDER], {
    rows: u64,
    #[serde(default = "shuffled")]
    order: String,
});
release!(Outer, &[], { inner: Empty });
release!(OuterLater, &[BIAS], {
    #[serde(default = "nested")]
    inner: Inner,
});

/// A part of a step, before it had a field.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Empty {}

/// The parameters in the key; parsed twice, as the engine does.
fn key<K: StepKind>(with: Value) -> Value {
    let row = Kind::of::<K>();
    let step = (row.parse)(&with).unwrap();
    let again = (row.parse)(&step.params()).unwrap();
    assert_eq!(step.key_params(), again.key_params());
    step.key_params()
}

#[test]
fn a_field_with_its_legacy_value_is_not_in_the_key() {
    let first = key::<First>(json!({ "rows": 1 }));
    assert_ne!(key::<Careless>(json!({ "rows": 1 })), first, "without ADDED all keys change");
    assert_eq!(key::<Second>(json!({ "rows": 1 })), first);
    assert_eq!(key::<Second>(json!({ "rows": 1, "order": "file" })), first);
    assert_ne!(key::<Second>(json!({ "rows": 1, "order": "random" })), first);
    let before = key::<Outer>(json!({ "inner": {} }));
    assert_eq!(key::<OuterLater>(json!({ "inner": { "bias": false } })), before);
    assert_ne!(key::<OuterLater>(json!({ "inner": { "bias": true } })), before);
}

#[test]
fn a_changed_default_changes_keys_and_the_legacy_value_stays() {
    let first = key::<First>(json!({ "rows": 1 }));
    let (by_default, spelled) =
        (key::<Third>(json!({ "rows": 1 })), key::<Third>(json!({ "rows": 1, "order": "random" })));
    assert_ne!(by_default, first, "what was made in the file's order is no hit");
    assert_eq!(by_default, spelled);
    assert_eq!(by_default, key::<Second>(json!({ "rows": 1, "order": "random" })));
    // Who asks for the old order gets what was made in it.
    assert_eq!(key::<Third>(json!({ "rows": 1, "order": "file" })), first);
}
