//! Loops compiled twice, for processors with AVX2 and FMA and for any other; the fitting one is taken at run time.

use std::any::TypeId;

use pulp::{Scalar256b, Simd, WithSimd};

/// Runs loops with the widest instructions that this processor has.
pub(crate) fn dispatch<Op: WithSimd>(op: Op) -> Op::Output {
    #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
    if let Some(simd) = pulp::x86::V3::try_new() {
        return Simd::vectorize(simd, op);
    }
    Scalar256b.vectorize(op)
}

/// Whether `a * b + c` is one instruction, rounded once. Where it isn't, a fused operation would be a slow call.
#[inline(always)]
pub(crate) fn fuses<S: Simd>() -> bool {
    TypeId::of::<S>() != TypeId::of::<Scalar256b>()
}

/// `a * b + c`, in one rounding if `FUSED`.
#[inline(always)]
pub(crate) fn fused<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// `a * b + c` of vectors, in one rounding where the processor has the instruction.
#[inline(always)]
pub(crate) fn multiply_add<S: Simd>(simd: S, a: S::f32s, b: S::f32s, c: S::f32s) -> S::f32s {
    if fuses::<S>() { simd.mul_add_f32s(a, b, c) } else { simd.add_f32s(simd.mul_f32s(a, b), c) }
}

/// Defines a function that dispatches to a loop: `fn name(..) => loop` calls `loop::<FUSED>(..)`, and with `<const N>`
/// `loop::<FUSED, N>(..)`. The loop must be `#[inline(always)]`, or it is compiled for one kind of processor only.
/// References are written with the lifetime `'a`.
macro_rules! wide {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $(<const $n:ident>)? ($($arg:ident: $ty:ty),* $(,)?) $(-> $out:ty)?
        => $body:ident) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments, reason = "those of the loop")]
        $vis fn $name<'a $(, const $n: usize)?>($($arg: $ty),*) $(-> $out)? {
            struct Op<'a $(, const $n: usize)?>($($ty),*);

            impl<'a $(, const $n: usize)?> pulp::WithSimd for Op<'a $(, $n)?> {
                type Output = $crate::simd::wide!(@output $($out)?);

                #[inline(always)]
                fn with_simd<S: pulp::Simd>(self, _: S) -> Self::Output {
                    let Self($($arg),*) = self;
                    if $crate::simd::fuses::<S>() {
                        $body::<true $(, $n)?>($($arg),*)
                    } else {
                        $body::<false $(, $n)?>($($arg),*)
                    }
                }
            }

            $crate::simd::dispatch(Op::<'a $(, $n)?>($($arg),*))
        }
    };
    (@output) => { () };
    (@output $out:ty) => { $out };
}
pub(crate) use wide;
