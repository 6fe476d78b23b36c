//! A private value can't be wrapped around data.

use tabmesh_privacy::private::Private;

fn main() {
    let rows = vec![1i64, 2, 3];
    let _ = Private::new(rows);
}
