//! A private value can't be written down as a literal.

use tabmesh_privacy::private::Private;

fn main() {
    let rows = vec![1i64, 2, 3];
    let _: Private<Vec<i64>> = Private { value: rows };
}
