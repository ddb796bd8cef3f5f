//! How much work the programs are for the kernel's verifier, held against a record: what it accepts today it may refuse
//! after one more branch.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use node::kernel::datapath::{Verified, VerifierOutcome, verified};

/// Kernels that must accept the programs, and have a record.
pub const PROMISED: [&str; 3] = ["6.1", "6.12", "6.18"];

/// Instructions processed, by the kernel's series and by program.
pub type Record = BTreeMap<String, BTreeMap<String, u32>>;

/// More than this share above the record is a failure, as much below it a hint.
const TOLERANCE_PERCENT: u64 = 20;

/// Makes the test write what it sees into the record.
pub const WRITE: &str = "RAMPART_WRITE_VERIFIER";

const RECORD: &str = include_str!("../../verifier.toml");

/// Loads every program and panics where the record says that it should be less work.
pub fn is_as_recorded() {
    let series = series();
    let seen = verified().expect("maps for every program");
    let section = section(&series, &seen);
    println!("{section}");
    let mut record: Record = toml::from_str(RECORD).expect("a record");
    if std::env::var_os(WRITE).is_some_and(|value| !value.is_empty()) {
        write(&mut record, &series, &seen);
    }
    let Compared { failures, hints } = compare(&record, &series, &seen);
    hints.iter().for_each(|hint| println!("{hint}"));
    assert!(
        failures.is_empty(),
        "{}\nif that is meant, run this test with {WRITE}=1, or under a kernel of a machine put this into tests/verifier.toml:\n{section}",
        failures.join("\n")
    );
}

/// What a comparison finds.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Compared {
    pub failures: Vec<String>,
    pub hints: Vec<String>,
}

/// Pure.
pub fn compare(record: &Record, series: &str, seen: &[Verified]) -> Compared {
    let mut compared = Compared::default();
    for one in seen {
        if let VerifierOutcome::Refused(why) = &one.outcome {
            compared.failures.push(format!("kernel {series} refuses `{}`: {why}", one.name));
        }
    }
    let is_promised = PROMISED.contains(&series);
    let Some(recorded) = record.get(series) else {
        let what = format!("there is no record of kernel {series}");
        let list = if is_promised { &mut compared.failures } else { &mut compared.hints };
        list.push(what);
        return compared;
    };
    for Verified { name, outcome } in seen {
        let instructions = match outcome {
            VerifierOutcome::Accepted(instructions) => *instructions,
            VerifierOutcome::AcceptedSilently => {
                compared.failures.push(format!("kernel {series} does not say how much work `{name}` is"));
                continue;
            }
            // Said above.
            VerifierOutcome::Refused(_) => continue,
        };
        let Some(&before) = recorded.get(name) else {
            compared
                .failures
                .push(format!("there is no record of `{name}` on kernel {series}: it takes {instructions}"));
            continue;
        };
        let (now, before) = (u64::from(instructions), u64::from(before));
        let what = format!("`{name}` takes {now} instructions on kernel {series}, recorded are {before}");
        if now * 100 > before * (100 + TOLERANCE_PERCENT) {
            compared.failures.push(what);
        } else if now * 100 < before * (100 - TOLERANCE_PERCENT) {
            compared.hints.push(format!("{what}: record the better figure with {WRITE}=1"));
        }
    }
    for name in recorded.keys().filter(|name| seen.iter().all(|one| one.name != **name)) {
        compared.failures.push(format!("`{name}` is recorded for kernel {series}, and there is no such program"));
    }
    compared
}

/// "6.18" of "6.18.5-cloud-amd64".
fn series() -> String {
    let name = nix::sys::utsname::uname().expect("a kernel");
    let release = name.release().to_string_lossy();
    let mut numbers = release.split(['.', '-']);
    format!("{}.{}", numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default())
}

fn section(series: &str, seen: &[Verified]) -> String {
    let mut text = format!("[\"{series}\"]\n");
    for (name, instructions) in counts(seen) {
        let _infallible = writeln!(text, "\"{name}\" = {instructions}");
    }
    text
}

fn counts(seen: &[Verified]) -> impl Iterator<Item = (String, u32)> + '_ {
    seen.iter().filter_map(|one| match one.outcome {
        VerifierOutcome::Accepted(instructions) => Some((one.name.clone(), instructions)),
        VerifierOutcome::AcceptedSilently | VerifierOutcome::Refused(_) => None,
    })
}

fn write(record: &mut Record, series: &str, seen: &[Verified]) {
    record.insert(series.to_owned(), counts(seen).collect());
    let mut text: String =
        RECORD.lines().take_while(|line| line.starts_with('#')).map(|line| format!("{line}\n")).collect();
    for (series, programs) in &*record {
        let seen = programs
            .iter()
            .map(|(name, count)| Verified { name: name.clone(), outcome: VerifierOutcome::Accepted(*count) });
        text.push('\n');
        text.push_str(&section(series, &seen.collect::<Vec<_>>()));
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("verifier.toml");
    std::fs::write(&path, text).unwrap_or_else(|error| panic!("failed to write `{}`: {error}", path.display()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jump_fails_a_fall_is_a_hint_and_a_promised_kernel_has_a_record() {
        let programs = |count: u32| BTreeMap::from([("a".to_owned(), count)]);
        let record = Record::from([("6.1".to_owned(), programs(1_000)), ("5.15".to_owned(), programs(1_000))]);
        let accepted = VerifierOutcome::Accepted;
        let check = |series: &str, name: &str, outcome: VerifierOutcome, failures: usize, hints: usize| {
            let seen = [Verified { name: name.to_owned(), outcome }];
            let compared = compare(&record, series, &seen);
            assert_eq!((compared.failures.len(), compared.hints.len()), (failures, hints), "{compared:?}");
        };
        check("6.1", "a", accepted(1_000), 0, 0);
        check("6.1", "a", accepted(1_200), 0, 0);
        check("6.1", "a", accepted(1_201), 1, 0);
        check("6.1", "a", accepted(800), 0, 0);
        check("6.1", "a", accepted(799), 0, 1);
        check("6.1", "a", VerifierOutcome::AcceptedSilently, 1, 0);
        check("6.1", "a", VerifierOutcome::Refused("stack".to_owned()), 1, 0);
        check("7.3", "a", VerifierOutcome::Refused("stack".to_owned()), 1, 1);
        check("6.1", "b", accepted(1_000), 2, 0);
        check("6.12", "a", accepted(1_000), 1, 0);
        check("7.3", "a", accepted(1_000), 0, 1);
    }

    #[test]
    fn the_promised_kernels_are_recorded() {
        let record: Record = toml::from_str(RECORD).expect("a record");
        for series in PROMISED {
            assert!(record.get(series).is_some_and(|programs| !programs.is_empty()), "kernel {series}");
        }
    }
}
