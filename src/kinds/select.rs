//! `select`.

use std::collections::BTreeMap;

use anyhow::Result;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::artifact::{AnyModel, Artifact as _, Report, Type};
use crate::source::{Fault, suggest};
use crate::step::{Context, Gather, Member, Ports, Problem, StepKind};

/// Picks the best of the models that a sweep made, by a metric of their reports.
///
/// Models and reports are joined by their sweep coordinates. Of equal values the point whose
/// coordinates come first wins. The result is the model itself, of the type that was gathered.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Select {
    /// The models to pick from.
    pub among: Gather<AnyModel>,
    /// Their reports.
    pub scores: Gather<Report>,
    /// The metric to pick by (`accuracy`, `f1`, `loss`, …).
    pub metric: String,
    /// Whether more is better or less.
    pub goal: Goal,
}

/// Which way is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Goal {
    /// More is better.
    Maximize,
    /// Less is better.
    Minimize,
}

/// Coordinates as people read them: `lora.alpha=8,lora.r=4`.
pub(super) fn coordinates(point: &BTreeMap<String, Value>) -> String {
    let text = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_owned);
    let pairs: Vec<String> = point.iter().map(|(k, v)| format!("{k}={}", text(v))).collect();
    if pairs.is_empty() { "the only point".into() } else { pairs.join(",") }
}

/// The member of a gather that belongs to a point: the one with the same coordinates, else the
/// one whose coordinates are all among the point's (it varies along fewer axes).
pub(super) fn member_at<'a>(
    members: &'a [Member],
    point: &BTreeMap<String, Value>,
) -> Option<&'a Member> {
    let inside = |m: &&Member| m.point.iter().all(|(k, v)| point.get(k) == Some(v));
    let same = members.iter().find(|m| m.point == *point);
    same.or_else(|| members.iter().filter(inside).max_by_key(|m| m.point.len()))
}

/// The position of the best value; of equal ones the first, and never one that is not finite.
fn best(values: &[f64], goal: Goal) -> Option<usize> {
    let mut best: Option<usize> = None;
    for (i, value) in values.iter().enumerate().filter(|(_, value)| value.is_finite()) {
        let better = best.is_none_or(|b| match goal {
            Goal::Maximize => *value > values[b],
            Goal::Minimize => *value < values[b],
        });
        if better {
            best = Some(i);
        }
    }
    best
}

impl StepKind for Select {
    const NAME: &'static str = "select";
    const VERSION: u32 = 1;

    fn ports(&self) -> Ports {
        Ports::of(self.among.ty().unwrap_or(Type::TrainedModel))
    }

    fn check(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        if self.metric.is_empty() {
            problems.push(Problem::error("metric", "expected the name of a metric"));
        }
        if self.among.members.is_empty() {
            problems.push(Problem::error("among", "there is nothing to pick from"));
        }
        let mut scored: Vec<(&Member, &Member)> = Vec::new();
        for model in &self.among.members {
            let at = coordinates(&model.point);
            let Some(report) = member_at(&self.scores.members, &model.point) else {
                let message = format!("there is no report for the model at {at}");
                let problem = Problem::error("scores", message);
                problems.push(problem.help("gather the reports over the same axes"));
                continue;
            };
            let taken = scored.iter().find(|(other, _)| std::ptr::eq(*other, report));
            if let Some((_, other)) = taken {
                let message = format!(
                    "the models at {} and {at} share one report, that at {}",
                    coordinates(&other.point),
                    coordinates(&report.point)
                );
                let problem = Problem::error("scores", message);
                problems.push(problem.help("score each model: gather reports over the same axes"));
            }
            scored.push((report, model));
        }
        problems
    }

    fn isolate(&self) -> bool {
        false
    }

    fn run(&self, cx: &mut Context<'_>) -> Result<()> {
        let mut values = Vec::new();
        for model in &self.among.members {
            let at = coordinates(&model.point);
            let Some(member) = member_at(&self.scores.members, &model.point) else {
                return Err(Fault::new(format!("there is no report for the model at {at}")).into());
            };
            let report = Report::open(cx.view(&member.input)?)?.file;
            let Some(value) = report.metrics.get(&self.metric) else {
                let known: Vec<&str> = report.metrics.keys().map(String::as_str).collect();
                let fault = Fault::new(format!("the report at {at} has no `{}`", self.metric));
                let help = suggest(&self.metric, &known).unwrap_or_default();
                return Err(fault.help(help).into());
            };
            values.push(*value);
        }
        let Some(best) = best(&values, self.goal) else {
            let fault = Fault::new(format!("`{}` is a finite number in no report", self.metric));
            return Err(fault.help("look at the reports, or pick by another metric").into());
        };
        let winner = &self.among.members[best];
        for (port, tree) in winner.input.ports.clone().unwrap_or_default() {
            cx.adopt(port, tree);
        }
        let at = coordinates(&winner.point);
        cx.log(format!("{at} has the best {} of {}: {}", self.metric, values.len(), values[best]));
        cx.fact("selected", at);
        cx.fact("point", Value::Object(winner.point.clone().into_iter().collect()));
        cx.fact(&self.metric, values[best]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn member(point: Value) -> Member {
        let input = json!({ "type": "report" });
        serde_json::from_value(json!({ "point": point, "input": input })).unwrap()
    }

    #[test]
    fn the_first_of_equals_wins() {
        assert_eq!(best(&[0.5, 0.7, 0.7], Goal::Maximize), Some(1));
        assert_eq!(best(&[0.5, 0.7, 0.5], Goal::Minimize), Some(0));
        assert_eq!(best(&[], Goal::Minimize), None);
    }

    #[test]
    fn what_is_not_finite_never_wins() {
        for goal in [Goal::Minimize, Goal::Maximize] {
            assert_eq!(best(&[f64::NAN, 0.5, f64::INFINITY], goal), Some(1));
            assert_eq!(best(&[f64::NAN, f64::NEG_INFINITY], goal), None);
        }
    }

    #[test]
    fn a_report_belongs_to_one_model() {
        let at = |r: i32, seed: i32| {
            let input = json!({ "type": "trained_model" });
            json!({ "point": { "r": r, "seed": seed }, "input": input })
        };
        let check = |among: Value| {
            let scores = json!([{ "point": { "r": 4 }, "input": { "type": "report" } }]);
            let gather = |members: Value| json!({ "$gather": { "members": members } });
            let step = json!({
                "among": gather(among), "scores": gather(scores),
                "metric": "loss", "goal": "minimize",
            });
            serde_json::from_value::<Select>(step).unwrap().check()
        };
        assert!(check(json!([at(4, 1)])).is_empty());
        let problems = check(json!([at(4, 1), at(4, 2)]));
        let [problem] = &problems[..] else { panic!("{problems:?}") };
        for part in ["r=4,seed=1", "r=4,seed=2", "that at r=4"] {
            assert!(problem.message.contains(part), "{}", problem.message);
        }
    }

    #[test]
    fn members_join_by_coordinates() {
        let members = [member(json!({ "r": 4 })), member(json!({ "r": 8 }))];
        let at = |point: Value| {
            let point: BTreeMap<String, Value> = serde_json::from_value(point).unwrap();
            member_at(&members, &point).map(|m| m.point["r"].clone())
        };
        assert_eq!(at(json!({ "r": 8 })), Some(json!(8)));
        assert_eq!(at(json!({ "r": 4, "seed": 1 })), Some(json!(4)));
        assert_eq!(at(json!({ "r": 5 })), None);
    }

    #[test]
    fn points_read_well() {
        let point: BTreeMap<String, Value> =
            serde_json::from_value(json!({ "lora.r": 8, "name": "full" })).unwrap();
        assert_eq!(coordinates(&point), "lora.r=8,name=full");
    }
}
