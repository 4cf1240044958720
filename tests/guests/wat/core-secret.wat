;; A core module that wants a function which WASI does not have.
(module
  (import "acme" "open_vault" (func $open (result i32)))
  (memory (export "memory") 1)
  (func (export "_start") (drop (call $open))))
