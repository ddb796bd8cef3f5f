//! The programs of the bench, loaded beside the node's on the same tables.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, MapData};
use aya::programs::{SchedClassifier, TestRun, TestRunOptions};
use aya::{Ebpf, EbpfLoader, Pod};
use ebpf_common::bench::{LOOP, PACKET, SAMPLES};
use ebpf_common::flow::{FILTER_WORDS, Flow, FlowFilter, FlowKey, TOTAL_GONE, TOTAL_OPENED};
use ebpf_common::{EGRESS, INGRESS, global, map};
use node::kernel::datapath::BENCH_OBJECT;

use crate::bench::statistics::{median, minimum};
use crate::conformance::Lab;

/// Passes through all samples after which another one is no faster.
const WARM_UPS: usize = 4;

/// Nanoseconds of one sample.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cost {
    pub(super) minimum: f64,
    pub(super) median: f64,
}

/// Nanoseconds of one sample, run by run: by a program, and by another one that only goes through the samples.
#[derive(Clone, Debug)]
pub(super) struct Costs {
    pub(super) with: Vec<f64>,
    pub(super) alone: Vec<f64>,
}

impl Costs {
    pub(super) const fn new() -> Self {
        Self { with: Vec::new(), alone: Vec::new() }
    }

    pub(super) fn cost(&self) -> Cost {
        net(&self.with, &self.alone)
    }

    /// Each run's own, paired with another's of the same turn.
    pub(super) fn beside(&self, other: &Self) -> Vec<(f64, f64)> {
        let net = |costs: &Self| -> Vec<f64> {
            costs.with.iter().zip(&costs.alone).map(|(with, alone)| with - alone).collect()
        };
        net(self).into_iter().zip(net(other)).collect()
    }
}

/// An instance for each direction. They share their records; counters, records and events are not the node's.
pub(super) struct Programs {
    egress: Ebpf,
    ingress: Ebpf,
}

impl Programs {
    /// Only these programs: the verifier takes its time. Of them `whole` in both directions.
    pub(super) fn load(lab: &Lab, names: &[&str]) -> Result<Self> {
        let state = lab.bpffs.join("bench");
        let _former = fs::remove_dir_all(&state);
        fs::create_dir(&state)?;
        let tables = lab.pin("maps");
        let both: Vec<&str> = names.iter().copied().filter(|name| *name == "whole").collect();
        let programs =
            Self { egress: load(EGRESS, &both, &tables, &state)?, ingress: load(INGRESS, names, &tables, &state)? };
        // The instances hold the maps themselves.
        fs::remove_dir_all(&state)?;
        Ok(programs)
    }

    fn instance(&mut self, direction: u32) -> &mut Ebpf {
        if direction == EGRESS { &mut self.egress } else { &mut self.ingress }
    }

    /// Nanoseconds that one sample takes by a program, net of another one that only goes through them. The two alternate.
    pub(super) fn cost(&mut self, name: &str, without: &str, packet: &[u8], runs: usize) -> Result<Cost> {
        Ok(self.costs([name], without, packet, runs)?[0].cost())
    }

    /// Likewise of several programs, which take turns: what disturbs the machine for a while disturbs them all.
    pub(super) fn costs<const N: usize>(
        &mut self,
        names: [&str; N],
        without: &str,
        packet: &[u8],
        runs: usize,
    ) -> Result<[Costs; N]> {
        let mut costs = [const { Costs::new() }; N];
        for _ in 0..runs {
            for (name, costs) in names.into_iter().zip(&mut costs) {
                costs.alone.push(self.run(INGRESS, without, packet)?.0);
                self.warm_up(name, packet)?;
                costs.with.push(self.run(INGRESS, name, packet)?.0);
            }
        }
        Ok(costs)
    }

    /// Warms the caches for a program, after the programs before it have evicted its data.
    pub(super) fn warm_up(&mut self, name: &str, packet: &[u8]) -> Result<()> {
        (0..WARM_UPS).try_for_each(|_| self.run(INGRESS, name, packet).map(drop))
    }

    /// Goes through all samples once; nanoseconds each, and how many of the last [`LOOP`] passed.
    pub(super) fn run(&mut self, direction: u32, name: &str, packet: &[u8]) -> Result<(f64, u32)> {
        let ran = classifier(self.instance(direction), name)?
            .test_run(TestRunOptions { data_in: Some(packet), repeat: SAMPLES / LOOP, ..TestRunOptions::default() })
            .with_context(|| format!("failed to run `{name}`"))?;
        Ok((ran.duration.as_nanos() as f64 / f64::from(LOOP), ran.return_value))
    }

    /// How many of all samples a program lets pass.
    pub(super) fn passed(&mut self, direction: u32, name: &str, packet: &[u8]) -> Result<u32> {
        let mut passed = 0;
        for _ in 0..SAMPLES / LOOP {
            let options = TestRunOptions { data_in: Some(packet), repeat: 1, ..TestRunOptions::default() };
            passed += classifier(self.instance(direction), name)?.test_run(options)?.return_value;
        }
        Ok(passed)
    }

    /// Nanoseconds of a pinned program on one packet, net of the empty one, repeated `repeat` times a run.
    pub(super) fn cost_of_pinned(&mut self, pin: &Path, packet: &[u8], repeat: u32, runs: usize) -> Result<Cost> {
        let pinned = SchedClassifier::from_pin(pin)?;
        let (mut with, mut alone) = (Vec::new(), Vec::new());
        for _ in 0..runs {
            let options = || TestRunOptions { data_in: Some(packet), repeat, ..TestRunOptions::default() };
            alone.push(classifier(&mut self.ingress, "empty")?.test_run(options())?.duration.as_nanos() as f64);
            with.push(pinned.test_run(options())?.duration.as_nanos() as f64);
        }
        Ok(net(&with, &alone))
    }

    /// Writes the samples of both instances, over and over where there are fewer than the arrays hold.
    pub(super) fn set<T: Pod>(&mut self, direction: u32, name: &str, samples: &[T]) -> Result<()> {
        ensure!(!samples.is_empty(), "there are no samples for `{name}`");
        let map = self.instance(direction).map_mut(name).with_context(|| format!("no map `{name}`"))?;
        let mut array: Array<&mut MapData, T> = Array::try_from(map)?;
        for index in 0..SAMPLES {
            array.set(index, samples[index as usize % samples.len()], 0)?;
        }
        Ok(())
    }

    /// Packets of one length; returns one of them, as the buffer to run with.
    pub(super) fn set_packets(&mut self, direction: u32, packets: &[Vec<u8>]) -> Result<Vec<u8>> {
        let first = packets.first().context("there are no packets")?.clone();
        ensure!(first.len() <= PACKET && packets.iter().all(|packet| packet.len() == first.len()), "of one length");
        let padded: Vec<[u8; PACKET]> = packets
            .iter()
            .map(|packet| {
                let mut bytes = [0; PACKET];
                bytes[..packet.len()].copy_from_slice(packet);
                bytes
            })
            .collect();
        self.set(direction, ebpf_common::bench::map::PACKETS, &padded)?;
        Ok(first)
    }

    pub(super) fn fill_trie<K: Pod>(&mut self, name: &str, entries: impl Iterator<Item = (u32, K, u32)>) -> Result<()> {
        let map = self.ingress.map_mut(name).with_context(|| format!("no map `{name}`"))?;
        let mut trie: LpmTrie<&mut MapData, K, u32> = LpmTrie::try_from(map)?;
        for (bits, key, value) in entries {
            trie.insert(&Key::new(bits, key), value, 0)?;
        }
        Ok(())
    }

    pub(super) fn fill_hash<K: Pod>(&mut self, name: &str, entries: impl Iterator<Item = (K, u32)>) -> Result<()> {
        let map = self.ingress.map_mut(name).with_context(|| format!("no map `{name}`"))?;
        let mut hash: HashMap<&mut MapData, K, u32> = HashMap::try_from(map)?;
        for (key, value) in entries {
            hash.insert(key, value, 0)?;
        }
        Ok(())
    }

    /// Deletes every record.
    pub(super) fn forget(&mut self) -> Result<usize> {
        let map = self.ingress.map_mut(map::FLOWS).context("no records")?;
        let mut flows: HashMap<&mut MapData, FlowKey, Flow> = HashMap::try_from(map)?;
        let keys: Vec<FlowKey> = flows.keys().collect::<Result<_, _>>()?;
        for key in &keys {
            flows.remove(key)?;
        }
        // As userspace would find it: no records.
        let filter = self.ingress.map_mut(map::FLOW_FILTER).context("no filter")?;
        let mut filter: Array<&mut MapData, FlowFilter> = Array::try_from(filter)?;
        filter.set(0, Box::new(FlowFilter { state: 1, bits: [0; 2 * FILTER_WORDS] }), 0)?;
        let totals = self.ingress.map_mut(map::FLOW_TOTALS).context("no totals")?;
        let mut totals: Array<&mut MapData, u64> = Array::try_from(totals)?;
        totals.set(TOTAL_OPENED, 0, 0)?;
        totals.set(TOTAL_GONE, 0, 0)?;
        Ok(keys.len())
    }
}

fn net(with: &[f64], alone: &[f64]) -> Cost {
    Cost { minimum: minimum(with) - minimum(alone), median: median(with) - median(alone) }
}

fn load(direction: u32, names: &[&str], tables: &Path, state: &Path) -> Result<Ebpf> {
    let (trace, link_header, allow) = (0u32, 0u32, -1i32);
    let mut loader = EbpfLoader::new();
    loader
        .btf(None)
        .override_global(global::DIRECTION, &direction, true)
        .override_global(global::TRACE, &trace, false)
        .override_global(global::LINK_HEADER, &link_header, true)
        .override_global(global::ALLOW, &allow, false);
    for table in map::POLICY {
        loader.map_pin_path(table, tables.join(table));
    }
    for name in map::STATE {
        loader.map_pin_path(name, state.join(name));
    }
    let mut ebpf = loader.load(BENCH_OBJECT).context("failed to create the maps of the bench")?;
    for name in names {
        classifier(&mut ebpf, name)?.load().with_context(|| format!("failed to load `{name}`"))?;
    }
    Ok(ebpf)
}

fn classifier<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier> {
    Ok(ebpf.program_mut(name).with_context(|| format!("the bench has no program `{name}`"))?.try_into()?)
}
