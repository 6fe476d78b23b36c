//! More classes than a pass tells apart: label digits for the column stage, a tree of classes for the in-context one.
//!
//! The column stage runs once per digit of the labels in a mixed radix and its outputs are averaged. The in-context
//! stage predicts balanced groups of classes, then classes within each group from that group's context rows, and
//! multiplies the probabilities down. Both rules are those of the public package (PyPI tabicl 2.2.0).

/// Balanced bases for `classes`, each at most `base`, whose product is at least `classes`; one base if they fit.
///
/// `base` is at least 2.
#[must_use]
pub fn radix_bases(classes: usize, base: usize) -> Vec<usize> {
    if classes <= base {
        return vec![classes];
    }
    // In floating point, as the package does: at exact powers rounding may add a digit.
    let digits = ((classes as f64).ln() / (base as f64).ln()).ceil();
    let root = ((classes as f64).powf(1.0 / digits).ceil() as usize).min(base);
    let mut bases = vec![root; digits as usize];
    for i in 0..bases.len() {
        if bases.iter().product::<usize>() >= classes {
            break;
        }
        bases[i] = (bases[i] + 1).min(base);
    }
    bases
}

/// The digits of a label, the most significant first; each is below its base.
#[must_use]
pub fn label_digits(label: usize, bases: &[usize]) -> Vec<usize> {
    let mut rest = label;
    let mut digits: Vec<usize> = bases
        .iter()
        .rev()
        .map(|base| {
            let digit = rest % base;
            rest /= base;
            digit
        })
        .collect();
    digits.reverse();
    digits
}

/// Sizes of the balanced groups that `classes` classes fall into, in order, the larger ones first; one group if one
/// pass tells them apart. At most `base` groups.
#[must_use]
pub fn group_sizes(classes: usize, base: usize) -> Vec<usize> {
    if classes <= base {
        return vec![classes];
    }
    let groups = classes.div_ceil(base).min(base);
    let mut left = classes;
    (0..groups)
        .map(|i| {
            let size = left.div_ceil(groups - i);
            left -= size;
            size
        })
        .collect()
}

/// One step of the class tree: which classes share a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    /// The groups, each a set of sorted classes. In a leaf every group is one class.
    pub(crate) groups: Vec<Vec<usize>>,
}

impl Node {
    /// The step for classes that occur among the rows of a node, sorted.
    pub(crate) fn new(classes: &[usize], base: usize) -> Self {
        if classes.len() <= base {
            return Self { groups: classes.iter().map(|class| vec![*class]).collect() };
        }
        let mut rest = classes;
        let groups = group_sizes(classes.len(), base)
            .into_iter()
            .map(|size| {
                let (group, others) = rest.split_at(size.min(rest.len()));
                rest = others;
                group.to_vec()
            })
            .collect();
        Self { groups }
    }

    /// Which group a class belongs to.
    pub(crate) fn group_of(&self, class: usize) -> Option<usize> {
        self.groups.iter().position(|group| group.binary_search(&class).is_ok())
    }
}

#[cfg(test)]
mod tests {
    use super::{Node, group_sizes, label_digits, radix_bases};

    /// The package's own documented examples, and the bases stored with the golden file of 13 classes.
    #[test]
    fn bases_and_groups_are_the_package_s() {
        assert_eq!(radix_bases(13, 10), [4, 4]);
        assert_eq!(radix_bases(25, 10), [5, 5]);
        assert_eq!(radix_bases(10, 10), [10]);
        assert_eq!(radix_bases(101, 10), [5, 5, 5]);
        assert_eq!(group_sizes(25, 10), [9, 8, 8]);
        assert_eq!(group_sizes(101, 10), [11, 10, 10, 10, 10, 10, 10, 10, 10, 10]);
        assert_eq!(group_sizes(11, 10), [6, 5]);
        assert_eq!(label_digits(19, &[5, 5]), [3, 4]);
    }

    #[test]
    fn every_label_has_its_own_digits_and_every_class_one_group() {
        for (classes, base) in
            [(2, 2), (3, 2), (11, 10), (100, 10), (101, 10), (999, 10), (1000, 10), (257, 3)]
        {
            let bases = radix_bases(classes, base);
            assert!(bases.iter().all(|b| *b <= base.max(classes.min(base))), "{classes} {bases:?}");
            assert!(bases.iter().product::<usize>() >= classes);
            let distinct: std::collections::BTreeSet<_> =
                (0..classes).map(|label| label_digits(label, &bases)).collect();
            assert_eq!(distinct.len(), classes);
            let all: Vec<usize> = (0..classes).collect();
            let node = Node::new(&all, base);
            assert!(node.groups.len() <= base);
            assert_eq!(node.groups.concat(), all);
            assert!(all.iter().all(|class| node.group_of(*class).is_some()));
        }
    }
}
