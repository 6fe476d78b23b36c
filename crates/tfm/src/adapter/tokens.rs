//! The default adapter: one delta per model column, added to the cells of query rows.
//!
//! Deltas are keyed by column, not by position; a column without a delta gets none.

use std::collections::BTreeMap;

use super::{
    AdapterKind, Entry, Layout,
    path::{Applied, Cells, Site},
};
use crate::{context::Context, error::TfmError};

#[derive(Debug)]
pub(super) struct Tokens;

impl AdapterKind for Tokens {
    fn entry(&self) -> Entry {
        Entry::Cells
    }

    fn applied(&self, layout: &Layout, values: &[f32], context: &Context) -> Result<Applied, TfmError> {
        let (config, width) = (context.model().config(), layout.width);
        if width != config.embed_dim {
            return Err(TfmError::mismatch("adapter width", config.embed_dim, width));
        }
        let own: BTreeMap<&String, usize> = layout.keys.iter().zip(0..).collect();
        let columns: Vec<Option<usize>> =
            context.column_keys().iter().map(|key| own.get(key).copied()).collect();
        let grouping = config.variant.grouping();
        let slots = grouping.slots(columns.len());
        // A slot holds several columns, with few columns also one column several times.
        let held = |slot| grouping.members(slot, columns.len()).filter_map(|column| *columns.get(column?)?);
        let members: Vec<Vec<usize>> = (0..slots).map(|slot| held(slot).collect()).collect();
        let mut delta = vec![0f32; slots * width];
        for (to, members) in delta.chunks_exact_mut(width).zip(&members) {
            for member in members {
                for (d, v) in to.iter_mut().zip(&values[member * width..]) {
                    *d += v;
                }
            }
        }
        Ok(Applied { cells: Some(Cells { delta, members }), ..Applied::default() })
    }

    fn add_gradient(&self, applied: &Applied, _values: &[f32], sites: &[Site<'_>], gradient: &mut [f32]) {
        let (Some(site), Some(Cells { members, .. })) = (sites.first(), &applied.cells) else { return };
        let width = site.gradient.len() / members.len().max(1);
        for (slot, members) in site.gradient.chunks_exact(width.max(1)).zip(members) {
            for member in members {
                for (to, g) in gradient[member * width..][..width].iter_mut().zip(slot) {
                    *to += g;
                }
            }
        }
    }
}
