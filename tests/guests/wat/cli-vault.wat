;; A `wasi:cli/run` component that wants an interface which no node gives: acme:secret/vault.
(component
  (import "acme:secret/vault" (instance $vault
    (export "open" (func (result u32)))))
  (core func $open (canon lower (func $vault "open")))
  (core module $code
    (import "vault" "open" (func $open (result i32)))
    (func (export "run") (result i32) (drop (call $open)) (i32.const 0)))
  (core instance $instance (instantiate $code
    (with "vault" (instance (export "open" (func $open))))))
  (func $run (result (result)) (canon lift (core func $instance "run")))
  (instance $cli (export "run" (func $run)))
  (export "wasi:cli/run@0.2.0" (instance $cli)))
