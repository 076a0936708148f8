// What access_regions() in ../compute.cpp writes to a bank: the first and the second position of a beat
// that lie in it.
module region_load #(
  parameter POSITIONS = 4, BANK = 3, ROW = 10, VECTOR = 64
) (
  input clk,
  input [BANK-1:0] bank,
  input [POSITIONS-1:0] valid,
  input [POSITIONS*BANK-1:0] banks,
  input [POSITIONS*ROW-1:0] rows,
  input [POSITIONS*VECTOR-1:0] vectors,
  output reg first, second,
  output reg [ROW-1:0] first_row, second_row,
  output reg [VECTOR-1:0] first_vector, second_vector
);
  reg [POSITIONS-1:0] here, one, two;
  integer i;
  reg seen, both;
  always @(posedge clk) begin
    seen = 0;
    both = 0;
    for (i = 0; i < POSITIONS; i = i + 1) begin
      one[i] <= valid[i] && banks[i*BANK +: BANK] == bank && !seen;
      two[i] <= valid[i] && banks[i*BANK +: BANK] == bank && seen && !both;
      if (valid[i] && banks[i*BANK +: BANK] == bank) begin
        both = seen;
        seen = 1;
      end
    end
    first <= |one;
    second <= |two;
    first_row <= 0;
    second_row <= 0;
    first_vector <= 0;
    second_vector <= 0;
    for (i = 0; i < POSITIONS; i = i + 1) begin
      if (one[i]) first_row <= rows[i*ROW +: ROW];
      if (two[i]) second_row <= rows[i*ROW +: ROW];
      if (one[i]) first_vector <= vectors[i*VECTOR +: VECTOR];
      if (two[i]) second_vector <= vectors[i*VECTOR +: VECTOR];
    end
  end
endmodule
