//! A further attribute as parent of those that depend on it: domains, of which no pair has to be counted anew.

use super::{MAX_CLIQUE_CELLS, TreeStructure};
use crate::SynthesisError;

impl TreeStructure {
    /// The tree with one more attribute, numbered after all others: the first in order, and a further parent of `dependents`.
    ///
    /// What stands above a dependent feature depends on it too, so that the running intersection holds. A feature whose clique
    /// would have more than [`MAX_CLIQUE_CELLS`] cells stays as it is, with all that hang on it. `cells` are the attributes' numbers of
    /// cells, the new one's last.
    ///
    /// # Errors
    /// [`SynthesisError::LayoutMismatch`] unless there is one number of cells an attribute;
    /// [`SynthesisError::UnknownAttribute`] for a dependent out of range.
    pub fn under(&self, dependents: &[usize], cells: &[usize]) -> Result<Self, SynthesisError> {
        let (added, attributes) = (self.attributes(), self.attributes() + 1);
        if cells.len() != attributes {
            let (expected, got) = (attributes, cells.len());
            return Err(SynthesisError::LayoutMismatch { what: "numbers of cells", expected, got });
        }
        if let Some(&got) = dependents.iter().find(|&&feature| feature >= added) {
            return Err(SynthesisError::UnknownAttribute { got, attributes: added });
        }
        let mut wanted = vec![false; added];
        dependents.iter().for_each(|&feature| wanted[feature] = feature != self.label);
        // What a feature hangs on comes before it.
        for &feature in self.order.iter().rev() {
            if let (true, Some(host)) = (wanted[feature], self.host(feature)) {
                wanted[host] = true;
            }
        }
        let mut grown = self.clone();
        grown.parent.push(None);
        grown.more.push(Vec::new());
        grown.order.insert(0, added);
        let mut given = vec![false; added];
        for &feature in &self.order {
            let clique = self.clique(feature);
            let size = clique.iter().chain([&self.label, &added]);
            let size = size.fold(1_usize, |n, attribute| n.saturating_mul(cells[*attribute]));
            let held = self.host(feature).is_none_or(|host| given[host]);
            if !(wanted[feature] && held && size <= MAX_CLIQUE_CELLS) {
                continue;
            }
            given[feature] = true;
            match self.parent(feature) {
                None => grown.parent[feature] = Some(added),
                Some(_) => grown.more[feature].push(added),
            }
        }
        Ok(grown)
    }
}
