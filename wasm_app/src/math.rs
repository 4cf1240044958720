//! Primorials of any size and factors of 64-bit numbers, without clock or chance: the same input does the same steps.

use std::num::NonZeroU64;

/// A limb of a decimal bignum holds nine digits, so that a product with a `u32` fits a `u64`.
const LIMB: u64 = 1_000_000_000;
const LIMB_DIGITS: usize = 9;

/// Primes tried by division before anything clever. The first twelve are also the Miller-Rabin bases that make the
/// test exact below 3.3 * 10^24 (Sorenson and Webster, "Strong pseudoprimes to twelve prime bases", 2015).
const SMALL_PRIMES: [u64; 25] =
    [2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97];
const BASES: usize = 12;

/// Steps of Pollard's rho whose differences are multiplied up before one gcd.
const BATCH: u64 = 128;

/// A prime and how often it divides the number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Factor {
    pub prime: u64,
    pub exponent: u32,
}

/// The primes up to and including `n`, in order (sieve of Eratosthenes).
pub fn primes_up_to(n: u32) -> Vec<u32> {
    let mut composite = vec![false; n as usize + 1];
    let mut primes = Vec::new();
    for candidate in 2..=n {
        if composite[candidate as usize] {
            continue;
        }
        primes.push(candidate);
        let first = candidate.saturating_mul(candidate);
        for multiple in (first..=n).step_by(candidate as usize) {
            composite[multiple as usize] = true;
        }
    }
    primes
}

/// The product of `factors` in decimal; the product of none is 1.
pub fn product(factors: &[u32]) -> String {
    let mut limbs = vec![1u64]; // least significant first
    for &factor in factors {
        let mut carry = 0;
        for limb in &mut limbs {
            let sum = *limb * u64::from(factor) + carry;
            *limb = sum % LIMB;
            carry = sum / LIMB;
        }
        if carry > 0 {
            limbs.push(carry);
        }
    }
    let mut limbs = limbs.iter().rev();
    let mut decimal = limbs.next().map(u64::to_string).unwrap_or_default();
    for limb in limbs {
        decimal.push_str(&format!("{limb:0LIMB_DIGITS$}"));
    }
    decimal
}

/// The prime factorization of `n`, smallest prime first; 1 has none.
pub fn factorize(n: NonZeroU64) -> Vec<Factor> {
    let mut rest = n.get();
    let mut primes = Vec::new();
    for prime in SMALL_PRIMES {
        while rest.is_multiple_of(prime) {
            primes.push(prime);
            rest /= prime;
        }
    }
    let mut unsplit = vec![rest];
    while let Some(number) = unsplit.pop() {
        if number == 1 {
            continue;
        }
        let ring = Montgomery::new(number);
        if is_prime(&ring) {
            primes.push(number);
        } else {
            let divisor = divisor(&ring);
            unsplit.extend([divisor, number / divisor]);
        }
    }
    primes.sort_unstable();
    primes.chunk_by(|a, b| a == b).map(|same| Factor { prime: same[0], exponent: same.len() as u32 }).collect()
}

/// Miller-Rabin for an odd modulus without a divisor in `SMALL_PRIMES`.
fn is_prime(ring: &Montgomery) -> bool {
    let n = ring.modulus;
    let twos = (n - 1).trailing_zeros();
    let minus_one = n - ring.one;
    SMALL_PRIMES.iter().take(BASES).all(|&base| {
        let mut power = ring.pow(ring.enter(base), (n - 1) >> twos);
        if power == ring.one || power == minus_one {
            return true;
        }
        for _ in 1..twos {
            power = ring.mul(power, power);
            if power == minus_one {
                return true;
            }
        }
        false
    })
}

/// A proper divisor of an odd composite modulus: Pollard's rho with the next polynomial x^2 + c until one splits it.
fn divisor(ring: &Montgomery) -> u64 {
    let mut c = 1;
    loop {
        if let Some(divisor) = rho(ring, c) {
            return divisor;
        }
        c += 1;
    }
}

/// Brent's form of Pollard's rho (R. P. Brent, "An improved Monte Carlo factorization algorithm", 1980). `None` when
/// every factor closes its cycle at the same step.
fn rho(ring: &Montgomery, c: u64) -> Option<u64> {
    let n = ring.modulus;
    let step = |x| ring.add(ring.mul(x, x), c);
    let mut y = 2;
    let mut length = 1;
    loop {
        let start = y;
        for _ in 0..length {
            y = step(y);
        }
        let mut done = 0;
        while done < length {
            let before = y;
            let mut product = ring.one;
            for _ in 0..BATCH.min(length - done) {
                y = step(y);
                product = ring.mul(product, start.abs_diff(y));
            }
            if gcd(product, n) != 1 {
                // Somewhere in this batch; again, one step at a time, because it may hold two factors.
                y = before;
                loop {
                    y = step(y);
                    let divisor = gcd(start.abs_diff(y), n);
                    if divisor != 1 {
                        return (divisor != n).then_some(divisor);
                    }
                }
            }
            done += BATCH;
        }
        length *= 2;
    }
}

fn gcd(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// Arithmetic modulo an odd number without division (P. L. Montgomery, "Modular multiplication without trial
/// division", 1985). A residue x stands for itself times 2^64.
struct Montgomery {
    modulus: u64,
    /// modulus^-1 mod 2^64
    inverse: u64,
    /// 2^64 mod modulus: what stands for 1
    one: u64,
}

impl Montgomery {
    fn new(modulus: u64) -> Self {
        // An odd number is its own inverse mod 8; each step of Newton's doubles the bits: 3, 6, 12, 24, 48, 96.
        let inverse = (0..5).fold(modulus, |x: u64, _| x.wrapping_mul(2u64.wrapping_sub(modulus.wrapping_mul(x))));
        Self { modulus, inverse, one: modulus.wrapping_neg() % modulus }
    }

    /// What stands for `x`.
    fn enter(&self, x: u64) -> u64 {
        ((u128::from(x) << 64) % u128::from(self.modulus)) as u64
    }

    fn add(&self, a: u64, b: u64) -> u64 {
        let room = self.modulus - b;
        if a >= room { a - room } else { a + b }
    }

    fn mul(&self, a: u64, b: u64) -> u64 {
        let wide = u128::from(a) * u128::from(b);
        let quotient = (wide as u64).wrapping_mul(self.inverse);
        let (high, excess) = ((wide >> 64) as u64, ((u128::from(quotient) * u128::from(self.modulus)) >> 64) as u64);
        if high >= excess { high - excess } else { self.modulus - (excess - high) }
    }

    fn pow(&self, mut base: u64, mut exponent: u64) -> u64 {
        let mut power = self.one;
        while exponent > 0 {
            if exponent & 1 == 1 {
                power = self.mul(power, base);
            }
            base = self.mul(base, base);
            exponent >>= 1;
        }
        power
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn factors(n: u64) -> Vec<(u64, u32)> {
        factorize(NonZeroU64::new(n).unwrap_or(NonZeroU64::MIN))
            .into_iter()
            .map(|factor| (factor.prime, factor.exponent))
            .collect()
    }

    #[test]
    fn primes_are_found_up_to_and_including_the_bound() {
        assert!(primes_up_to(0).is_empty() && primes_up_to(1).is_empty());
        assert_eq!(primes_up_to(2), [2]);
        assert_eq!(primes_up_to(30), [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]);
        assert_eq!(primes_up_to(31).last(), Some(&31));
        assert_eq!(primes_up_to(10_000).len(), 1229);
    }

    #[test]
    fn products_carry_and_keep_the_zeros_inside() {
        assert_eq!(product(&[]), "1");
        assert_eq!(product(&[7]), "7");
        assert_eq!(product(&primes_up_to(30)), "6469693230");
        assert_eq!(product(&[1_000_000_000, 1_000_000_000, 3]), "3000000000000000000");
        assert_eq!(product(&[u32::MAX, u32::MAX, u32::MAX]), "79228162458924105385300197375");
        assert_eq!(product(&primes_up_to(100)), "2305567963945518424753102147331756070");
    }

    #[test]
    fn one_has_no_prime_factors() {
        assert_eq!(factors(1), []);
    }

    #[test]
    fn factorizations_agree_with_trial_division() {
        for n in 1..200_000u64 {
            let (mut rest, mut expected) = (n, Vec::new());
            for prime in (2..).take_while(|prime| prime * prime <= n) {
                let mut exponent = 0;
                while rest.is_multiple_of(prime) {
                    rest /= prime;
                    exponent += 1;
                }
                expected.extend((exponent > 0).then_some((prime, exponent)));
            }
            expected.extend((rest > 1).then_some((rest, 1)));
            assert_eq!(factors(n), expected, "{n}");
        }
    }

    #[test]
    fn factors_multiply_to_the_number_near_the_powers_of_two() {
        for n in (1..64).flat_map(|bit| (0..50).map(move |k| (1u64 << bit).wrapping_sub(k))).filter(|&n| n > 0) {
            assert_eq!(factors(n).iter().map(|(prime, exponent)| prime.pow(*exponent)).product::<u64>(), n);
        }
    }

    #[test]
    fn the_hardest_numbers_of_64_bits_are_factored() {
        assert_eq!(factors(u64::MAX), [(3, 1), (5, 1), (17, 1), (257, 1), (641, 1), (65_537, 1), (6_700_417, 1)]);
        assert_eq!(factors(u64::MAX - 58), [(18_446_744_073_709_551_557, 1)]); // the largest prime
        assert_eq!(factors(4_294_967_291 * 4_294_967_279), [(4_294_967_279, 1), (4_294_967_291, 1)]);
        assert_eq!(factors(4_294_967_291 * 4_294_967_291), [(4_294_967_291, 2)]);
        assert_eq!(factors(2_642_239 * 2_642_239 * 2_642_239), [(2_642_239, 3)]);
        assert_eq!(factors(65_521 * 65_521 * 65_521 * 65_521), [(65_521, 4)]);
        assert_eq!(factors(101 * 101), [(101, 2)]);
        assert_eq!(factors(1 << 63), [(2, 63)]);
    }

    #[test]
    fn strong_pseudoprimes_are_told_from_primes() {
        assert_eq!(factors(3_215_031_751), [(151, 1), (751, 1), (28_351, 1)]); // to the bases 2, 3, 5, 7
        assert_eq!(factors(3_825_123_056_546_413_051), [(149_491, 1), (747_451, 1), (34_233_211, 1)]); // to the first nine
        assert_eq!(factors(825_265), [(5, 1), (7, 1), (17, 1), (19, 1), (73, 1)]); // a Carmichael number
    }
}
