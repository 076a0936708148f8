// Dot products over the TN channels of a tap: the twin of Dot<BITS, TN> in ../dot.h. A DSP48E2 has
// a signed multiplier of 27 x 18 bits:
//
//   16 bit   one product a DSP48E2
//    8 bit   two:  (w1 << 18) + w0  times  x
//    4 bit   four: (w1 << 22) + w0  times  (x1 << 11) + x0
//
// Each product lies in a field of the result. The results of 8 channels are added before the fields
// are separated: a field has room for that, because weights are symmetric (|w| <= 2^(BITS-1) - 1).
// A negative field has borrowed 1 from the field above. With PACKED = 0 each product has a
// multiplier of its own.
//
// w is [weights][TN], x [features][TN], out [weights][features], the first at the lowest bits.
// valid and `tag` come out with the sums, LATENCY steps after they went in.
module dot #(
  parameter BITS = 8, TN = 8, PACKED = 1, TAG = 1
) (clk, step, valid_in, tag_in, w, x, valid_out, tag_out, out);
  localparam WEIGHTS = BITS == 16 ? 1 : 2;
  localparam FEATURES = BITS == 4 ? 2 : 1;
  localparam PRODUCTS = WEIGHTS * FEATURES;
  localparam CHANNELS = TN < 8 ? TN : 8;            // of a cascade
  localparam CASCADES = (TN + 7) / 8;
  localparam OUT = 2 * BITS + 8;
  localparam LATENCY = CHANNELS + 3;                // cascade, then the fields
  localparam FIELD = BITS == 4 ? 11 : 18;           // the lower field, or fields
  localparam HIGH = BITS == 4 ? 22 : 18;            // where w1 sits
  localparam MULTIPLIERS = PACKED ? 1 : PRODUCTS;
  localparam A = PACKED && BITS != 16 ? 27 : BITS;
  localparam B = PACKED && BITS == 4 ? 18 : BITS;

  input clk, step, valid_in;
  input [TAG-1:0] tag_in;
  input [WEIGHTS*TN*BITS-1:0] w;
  input [FEATURES*TN*BITS-1:0] x;
  output valid_out;
  output [TAG-1:0] tag_out;
  output [PRODUCTS*OUT-1:0] out;

  delay #(.WIDTH(TAG + 1), .CYCLES(LATENCY)) beside
      (clk, step, {tag_in, valid_in}, {tag_out, valid_out});

  wire signed [47:0] sums [0:CASCADES*MULTIPLIERS-1];
  genvar c, m, n;
  generate
    for (c = 0; c < CASCADES; c = c + 1) begin : cascades
      for (m = 0; m < MULTIPLIERS; m = m + 1) begin : multipliers
        wire [CHANNELS*A-1:0] a;
        wire [CHANNELS*B-1:0] b;
        for (n = 0; n < CHANNELS; n = n + 1) begin : channels
          localparam AT = c * 8 + n;
          if (AT >= TN) begin : filled_up
            assign a[n*A +: A] = {A{1'b0}};
            assign b[n*B +: B] = {B{1'b0}};
          end else if (!PACKED || BITS == 16) begin : alone
            assign a[n*A +: A] = w[(m / FEATURES * TN + AT) * BITS +: BITS];
            assign b[n*B +: B] = x[(m % FEATURES * TN + AT) * BITS +: BITS];
          end else begin : together
            wire signed [BITS-1:0] w0 = w[AT*BITS +: BITS];
            wire signed [BITS-1:0] w1 = w[(TN+AT)*BITS +: BITS];
            wire signed [A-1:0] both = w1;
            wire signed [A-1:0] low = w0;
            assign a[n*A +: A] = (both <<< HIGH) + low;
            if (BITS == 8) begin : one
              assign b[n*B +: B] = x[AT*BITS +: BITS];
            end else begin : two
              wire signed [BITS-1:0] x0 = x[AT*BITS +: BITS];
              wire signed [BITS-1:0] x1 = x[(TN+AT)*BITS +: BITS];
              wire signed [B-1:0] both_x = x1;
              wire signed [B-1:0] low_x = x0;
              assign b[n*B +: B] = (both_x <<< FIELD) + low_x;
            end
          end
        end
        cascade #(.CHANNELS(CHANNELS), .A(A), .B(B)) column
            (clk, step, a, b, sums[c*MULTIPLIERS + m]);
      end
    end
  endgenerate

  // Separates the fields, lowest first, and adds those of all cascades.
  reg [PRODUCTS*OUT-1:0] fields, totals;
  reg signed [47:0] rest;
  integer i, p;
  always @* begin
    fields = {PRODUCTS*OUT{1'b0}};
    for (i = 0; i < CASCADES; i = i + 1) begin
      rest = sums[i*MULTIPLIERS];
      for (p = 0; p < PRODUCTS; p = p + 1)
        if (MULTIPLIERS == PRODUCTS)
          fields[p*OUT +: OUT] = fields[p*OUT +: OUT] + sums[i*MULTIPLIERS + p % MULTIPLIERS];
        else if (p == PRODUCTS - 1)
          fields[p*OUT +: OUT] = fields[p*OUT +: OUT] + rest[OUT-1:0];
        else begin
          fields[p*OUT +: OUT] = fields[p*OUT +: OUT]
                                 + {{(OUT-FIELD){rest[FIELD-1]}}, rest[FIELD-1:0]};
          rest = (rest >>> FIELD) + $signed({1'b0, rest[FIELD-1]});
        end
    end
  end
  always @(posedge clk) if (step) totals <= fields;
  assign out = totals;
endmodule
